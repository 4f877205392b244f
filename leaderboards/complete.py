"""How many images complete datasets have, by which a run's data are known for what they are, whatever their folder.

The same numbers stand in evaluate/datasets.py, which this folder does not import; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssl_bench.leaderboards.record import Record


def _split(train: int, val: int) -> dict[str, int]:
    return {"train": train, "val": val}


COMPLETE: Mapping[str, Mapping[str, int]] = {
    "toy": _split(4000, 1000),
    "digits": _split(1438, 359),
    "imagenet": _split(1_281_167, 50_000),
    "imagenet-100": _split(126_689, 5_000),
    "imagenet-22k": _split(14_197_122, 0),
    "cifar10": _split(50_000, 10_000),
    "cifar100": _split(50_000, 10_000),
    "flowers102": _split(2_040, 6_149),
    "pets": _split(3_680, 3_669),
    "cars": _split(8_144, 8_041),
    "mini-imagenet": _split(38_400, 12_000),
    "coco": _split(118_287, 5_000),
    "roxford5k": {"queries": 70, "database": 4_993},
    "rparis6k": {"queries": 70, "database": 6_322},
    "ade20k": _split(20_210, 2_000),
    "cityscapes": _split(2_975, 500),
    "voc": _split(1_464, 1_449),
    "voc-aug": _split(10_582, 1_449),
    "imagenet-s-919": _split(9_190, 12_419),
    "imagenet-s-300": _split(3_000, 4_097),
    "imagenet-s-50": _split(500, 752),
}
_USUAL_FOLDERS = {"cifar-10-batches-bin": "cifar10", "cifar-100-binary": "cifar100"}  # the two have equal counts


def other_data(record: Record, dataset: str) -> list[str]:
    """Where the run's data are not those of `dataset`, as far as names and numbers tell: empty if they are."""
    complete = COMPLETE.get(dataset, {})
    counted = {split: count for split, count in record.n_samples.original.items() if complete.get(split)}
    # A split that the run did not read may well be missing.
    lacking = {
        split: count
        for split, count in counted.items()
        if count != complete[split] and record.n_samples.evaluated.get(split)
    }
    if record.dataset == dataset:
        return [f"images: {count:,} of {complete[split]:,} in {split}" for split, count in lacking.items()]
    name = _USUAL_FOLDERS.get(record.dataset, record.dataset)
    another = name != dataset and (name in COMPLETE or dataset in _USUAL_FOLDERS.values())
    if not another and not lacking and any(record.n_samples.evaluated.get(split) for split in counted):
        return []
    return [f"dataset: {record.dataset}, not {dataset}"]
