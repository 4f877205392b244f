"""Open any image-classification dataset where it lies, in its own layout.

    open_dataset("imagenet")                   a name: looked for under SSL_BENCH_DATA
    open_dataset("/data/birds")                a path: the layout is recognized by looking
    open_dataset("toy"), open_dataset("digits")                built in, made on first use, never downloaded
    open_dataset("imagenet", train_list=Path("1percent.txt"))  MSN's and SimCLR's low-shot lists

Nothing is downloaded, unpacked or written beside the data. Each layout has a file of its own: class folders and flat
`val` in layouts.py, CIFAR's batches and tar shards in archives.py, official annotation files in annotated.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ssl_bench.errors import UserError, unknown
from ssl_bench.evaluate import annotated, archives, builtin_data, layouts
from ssl_bench.evaluate.coco import COCO, open_coco
from ssl_bench.evaluate.data_check import CheckReport, Expected, examine
from ssl_bench.evaluate.decoding import BrokenImage
from ssl_bench.evaluate.landmarks import LANDMARKS, open_landmarks
from ssl_bench.evaluate.masks import KNOWN, MASKS, known_places, looks_like_masks, open_masks
from ssl_bench.evaluate.object_masks import OBJECTS, open_objects
from ssl_bench.evaluate.splits import AnyDataset, Dataset, Split, name_of
from ssl_bench.evaluate.subsets import listed_classes, listed_images
from ssl_bench.evaluate.videos import VIDEOS, looks_like_videos, open_videos
from ssl_bench.files import data_folder, expanded

__all__ = [
    "DATASETS",
    "KINDS",
    "BrokenImage",
    "CheckReport",
    "Dataset",
    "Known",
    "Split",
    "check_dataset",
    "complete_counts",
    "open_dataset",
]

IMAGENET_100 = Path(__file__).parent / "synsets" / "imagenet-100.txt"

_FOLDERS = "class folders train/<class>/ and val/<class>/"
_EVERY_LAYOUT = (
    f"{_FOLDERS} (or validation, valid, test); a flat val with a list of its labels; <class>/ folders alone "
    "(train only); CIFAR's binary batches; tar shards; or the official layout of Flowers-102, Pets, Cars, mini-ImageNet"
)


@dataclass(frozen=True)
class Known:
    """A dataset that can be given by name."""

    description: str
    layout: str  # what is expected, in words
    expected: Expected  # the complete dataset, for `ssl-bench data check`
    page: str = ""  # the page that offers it for download; "" for built-in data
    folders: tuple[str, ...] = ()  # under SSL_BENCH_DATA, beside the dataset's name itself
    built_in: Callable[[], Dataset] | None = None
    classes_of: str = ""  # it is that dataset, reduced to the classes of `class_list`
    class_list: Path | None = None


# fmt: off
DATASETS: dict[str, Known] = {
    "toy": Known("the toy world: 10 classes that differ in shape and pattern", "made on first use",
                 Expected(10, 4000, 1000), built_in=builtin_data.open_toy),
    "digits": Known("scikit-learn's handwritten digits, 8 x 8 gray", "made on first use",
                    Expected(10, 1438, 359), built_in=builtin_data.open_digits),
    "imagenet": Known("ImageNet-1k (ILSVRC 2012)", f"{_FOLDERS} by synset, or a flat val with a list of its labels",
                      Expected(1000, 1_281_167, 50_000), page="ImageNet, ILSVRC 2012"),
    "imagenet-100": Known("100 classes of ImageNet-1k, the list of CMC", f"{_FOLDERS} by synset, or imagenet beside it",
                          Expected(100, 126_689, 5_000), page="ImageNet, ILSVRC 2012",
                          classes_of="imagenet", class_list=IMAGENET_100),
    "imagenet-22k": Known("ImageNet-22k (fall 2011), train only", "folders <synset>/ or train/<synset>/",
                          Expected(21_841, 14_197_122, 0), page="ImageNet, fall 2011"),
    "cifar10": Known("CIFAR-10", "the binary version, cifar-10-batches-bin/*.bin",
                     Expected(10, 50_000, 10_000), page="The CIFAR-10 dataset", folders=("cifar-10-batches-bin",)),
    "cifar100": Known("CIFAR-100, fine labels", "the binary version, cifar-100-binary/{train,test}.bin",
                      Expected(100, 50_000, 10_000), page="The CIFAR-100 dataset", folders=("cifar-100-binary",)),
    "flowers102": Known("Oxford 102 Flowers; train + val for training", "jpg/, imagelabels.mat, setid.mat",
                        Expected(102, 2_040, 6_149), page="102 Category Flower Dataset", folders=("flowers-102",)),
    "pets": Known("Oxford-IIIT Pets, 37 breeds", "images/, annotations/{trainval,test}.txt",
                  Expected(37, 3_680, 3_669), page="The Oxford-IIIT Pet Dataset", folders=("oxford-iiit-pet",)),
    "cars": Known("Stanford Cars, 196 models", "cars_train/, cars_test/, devkit/*.mat, cars_test_annos_withlabels.mat",
                  Expected(196, 8_144, 8_041), page="Cars Dataset", folders=("stanford_cars",)),
    "mini-imagenet": Known("mini-ImageNet: train.csv, and test.csv with 20 other classes", "images/, {train,test}.csv",
                           Expected(64, 38_400, 12_000), page="mini-ImageNet (Ravi and Larochelle's lists)"),
}
# fmt: on


def open_dataset(
    spec: str, *, train_list: Path | None = None, val_list: Path | None = None, class_list: Path | None = None
) -> Dataset:
    """Open a dataset by name or path; the lists keep the images, then the classes, that they name."""
    try:
        dataset = _open(spec)
        train, val = dataset.train, dataset.val
        if train_list:
            train = listed_images(_required(train, "train", dataset, train_list), train_list)
        if val_list:
            val = listed_images(_required(val, "val", dataset, val_list), val_list)
        dataset = replace(dataset, train=train, val=val)
        return _only_classes(dataset, class_list) if class_list else dataset
    except OSError as error:  # an unreadable folder, a drive that went away
        raise UserError(
            f"cannot read {error.filename or spec}: {error.strerror or error}. Make it readable."
        ) from error


@dataclass(frozen=True)
class Kind:
    """What a protocol may read: how it is opened, and which built-in dataset stands for it when none is named."""

    open: Callable[[str], AnyDataset]
    default: str
    names: Mapping[str, str]  # what is known by name, in words


# By the name that a protocol gives as its DATA.
KINDS: dict[str, Kind] = {
    "images": Kind(open_dataset, "toy", {name: known.description for name, known in DATASETS.items()}),
    "boxes": Kind(open_coco, "toy-coco", COCO),
    "landmarks": Kind(open_landmarks, "toy-roxford", LANDMARKS),
    "masks": Kind(open_masks, "toy-ade20k", MASKS),
    "objects": Kind(open_objects, "toy-coco", OBJECTS),
    "videos": Kind(open_videos, "toy-davis", VIDEOS),
}
# Counts of the complete datasets that are not of images.
_COMPLETE: dict[str, dict[str, int]] = {
    "toy-coco": Expected(10, 400, 200).counts(),
    "coco": Expected(80, 118_287, 5_000).counts(),
    "toy-roxford": {"queries": 60, "database": 600},
    "roxford5k": {"queries": 70, "database": 4_993},
    "rparis6k": {"queries": 70, "database": 6_322},
    "toy-ade20k": Expected(11, 400, 100).counts(),
    "toy-cityscapes": Expected(19, 400, 100).counts(),
    "toy-voc": Expected(11, 400, 100).counts(),
    "toy-imagenet-s": Expected(11, 400, 100).counts(),
    "toy-davis": {"train": 48, "val": 240},  # frames
    **{name: Expected(*known.complete).counts() for name, known in KNOWN.items()},
}


def named_places(name: str) -> list[Path]:
    """Where a dataset is looked for that is given by name."""
    if name in KNOWN:
        return known_places(name)
    folders = DATASETS[name].folders if name in DATASETS else ()
    return [data_folder() / folder for folder in (name, *folders)]


def open_images(spec: str) -> Dataset:
    """Open `spec` for pre-training, which needs no labels: any folder of images will do, however deep they lie."""
    dataset = _open_unlabeled(spec) or open_dataset(spec)
    if dataset.train is None:
        raise UserError(f"{spec} has no training images: expected a train folder, or a folder of images.")
    return dataset


def _open_unlabeled(spec: str) -> Dataset | None:
    """A folder, or its train folder, that holds images but not in one of the layouts with labels."""
    path = expanded(spec)
    if spec in DATASETS or not path.is_dir():
        return None
    folder = path / "train" if (path / "train").is_dir() else path
    if folder is path and (path / "val").is_dir():
        return None
    try:
        split = None if _is_dataset(folder) else layouts.open_unlabeled(folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}.") from error
    if split is None:
        return None
    return Dataset(path.resolve().name, path, False, split, None, layout="images without labels")


def _is_dataset(root: Path) -> bool:
    """Whether a folder has one of the layouts with labels."""
    known = any(recognizes(root) for recognizes, _ in annotated.OPENERS.values())
    return bool(known or archives.find_cifar(root) or archives.find_shards(root) or layouts.has_class_folders(root))


def check_dataset(spec: str, *, decode: bool = True, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Report what is there and what is wrong.

    With `decode` every image is opened, else a sample of them; `progress` is called with done, total.
    """
    kind = _kind_of(spec)
    return examine(
        spec,
        lambda: KINDS[kind].open(spec),
        kind=kind,
        complete=complete_counts(spec),
        decode=decode,
        progress=progress,
    )


def complete_counts(name: str) -> dict[str, int] | None:
    """Images by split of a complete dataset, and its classes where it has any; None where that is not known."""
    return DATASETS[name].expected.counts() if name in DATASETS else _COMPLETE.get(name)


def _kind_of(spec: str) -> str:
    """By name, else by looking; what looks like nothing is opened as labeled images, which says what is expected."""
    for kind, others in KINDS.items():
        if spec in others.names:
            return kind
    root = expanded(spec)
    if any(root.glob("gnd_*.pkl")):
        return "landmarks"
    if any(root.glob("annotations/instances_*.json")):
        return "boxes"
    if looks_like_videos(root):
        return "videos"
    return "masks" if looks_like_masks(root) else "images"


def _open(spec: str) -> Dataset:
    """Decide between a name and a path; a name wins, `./name` is a path."""
    if known := DATASETS.get(spec):
        return known.built_in() if known.built_in else _open_name(spec, known)
    path = expanded(spec)
    if not path.exists():
        if os.sep in spec or spec.startswith((".", "~")):
            raise UserError(f"there is no folder {path}. Expected a dataset's folder, or one of {', '.join(DATASETS)}.")
        for kind, others in KINDS.items():
            if spec in others.names:
                raise UserError(
                    f"{spec} is a dataset of {kind}, which other protocols read; this one reads "
                    f"labeled images: {', '.join(DATASETS)}, or a folder."
                )
        raise unknown("dataset", spec, DATASETS)
    return _open_path(path, name_of(path))


def _open_name(name: str, known: Known) -> Dataset:
    """Look under SSL_BENCH_DATA."""
    places = named_places(name)
    for place in places:
        if place.exists():
            return _open_path(place, name)
    whole = data_folder() / known.classes_of
    if known.class_list and whole.exists():
        return replace(
            _only_classes(_open_path(whole, name), known.class_list), layout=f"classes of {known.classes_of}"
        )
    beside = f", or {whole}" if known.classes_of else ""
    here = f" (the {name} in this folder is given as ./{name})" if Path(name).exists() else ""
    raise UserError(
        f"dataset {name!r} is not in {data_folder()}. Expected {places[0]}{beside}, with {known.layout}; see the page "
        f"{known.page!r}. Set SSL_BENCH_DATA to the folder that holds it, or give its path instead of its name{here}."
    )


def _open_path(root: Path, name: str) -> Dataset:
    """Recognize the layout by looking, the most particular first."""
    if not root.is_dir():
        raise UserError(f"{root} is a file. Expected a dataset's folder: {_EVERY_LAYOUT}.")
    if not any(root.iterdir()):
        raise UserError(f"{root} is empty. Expected {_EVERY_LAYOUT}.")
    if archives.find_cifar(root):
        return archives.open_cifar(root, name)
    for recognizes, opens in annotated.OPENERS.values():
        if recognizes(root):
            return opens(root, name)
    if archives.find_shards(root):
        return archives.open_tar_shards(root, name)
    if layouts.has_split_folders(root):
        return layouts.open_split_folders(root, name)
    if layouts.has_class_folders(root):
        return layouts.open_train_only(root, name)
    raise UserError(
        f"{root} has neither train nor val, and no folders of images. Expected {_EVERY_LAYOUT}. If the dataset lies "
        "one folder deeper, give that folder."
    )


def _only_classes(dataset: Dataset, class_list: Path) -> Dataset:
    """Both splits reduced to the listed classes."""
    if dataset.disjoint_classes:
        raise UserError(f"{dataset.name} has different classes in train and val; a class list cannot serve both.")
    train = listed_classes(dataset.train, class_list) if dataset.train else None
    val = listed_classes(dataset.val, class_list) if dataset.val else None
    return replace(dataset, train=train, val=val)


def _required(split: Split | None, name: str, dataset: Dataset, path: Path) -> Split:
    """A list of images needs the split that it lists."""
    if split is None:
        raise UserError(f"{path} lists images of {name}, and {dataset.name} ({dataset.root}) has no {name} split.")
    return split
