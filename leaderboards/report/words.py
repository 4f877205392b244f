"""How numbers, metrics and protocols are written, the same on every page."""

from __future__ import annotations

import math
import re
from typing import Any

from ssl_bench.leaderboards.record import Record, Score, settings_text
from ssl_bench.leaderboards.table import cell_of, column_deviations, text_of

_METRICS = {
    "knn_top1": "k-NN top-1",
    "linear_top1": "linear top-1",
    "finetune_top1": "fine-tuning top-1",
    "lowshot_top1": "low-shot top-1",
    "fewshot_top1": "few-shot top-1",
    "miou": "mIoU",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
}
_UNITS = {
    "epoch_minutes": "minutes",
    "images_per_second": "images a second",
    "step_seconds": "seconds",
    "peak_memory_gib": "GiB",
    "gflops_per_image": "GFLOP",
    "frames_followed": "frames",
}
_BARE = re.compile(r"overlap_area|.*_cosine|.*_variance(_ratio)?")  # numbers without a unit

# What stands in a leaderboard's heads, for those who see one for the first time.
_GLOSSARY = {
    "knn": "every image gets the class of its nearest neighbors among the training features",
    "linear": "one linear layer is trained on frozen features",
    "lowshot": "logistic regression on frozen features of few labeled images; top1_1shot: of one a class",
    "finetune": "the whole network is trained further, with labels",
    "adapters": "the network is frozen, small adapters in it are trained with labels",
    "fewshot": "episodes of few classes with few images each",
    "retrieval": "images of one landmark are looked for among others",
    "stability": "how much an image's tokens change when it is cropped or partly covered",
    "locality": "whether the crop of one object finds the box of another one of its category",
    "semseg": "a head on the network labels every pixel",
    "detection": "a detector on the network finds objects with boxes and masks",
    "zeroshot": "every patch that is like one prompted patch is taken for its object; miou_opt: the mean intersection "
    "over union at the threshold that is best for all",
    "similarity": "how alike patches of one category and of two are; overlap_area: what the two distributions share, "
    "at most 1",
    "davis": "objects are followed through a video from their masks in its first frame; jf_mean: the mean of region "
    "(J) and contour (F) agreement",
    "efficiency": "what pre-training costs on this machine",
}
TERMS = (
    ("knn/dino@v1", "a protocol, one of its recipes (the settings of one paper), and the version of our code for it"),
    ("±", "how uncertain a number is; what it is made of stands in the column's head or below the table"),
    ("ddof=1", "a standard deviation that divides by n - 1; ddof=0 divides by n"),
    ("limited", "a run on the first few images alone (--limit), to try something: in no leaderboard"),
)


def metric_in_words(name: str) -> str:
    """A metric or setting of a paper in words."""
    return _METRICS.get(name, name.replace("_", " "))


def unit(metric: str) -> str:
    """Of a score: percent, unless its name says otherwise."""
    return _UNITS.get(metric, "" if _BARE.fullmatch(metric) else "%")


def with_unit(metric: str) -> str:
    """`top1, %`."""
    return ", ".join(filter(None, [metric, unit(metric)]))


def glossary(protocols: set[str]) -> list[tuple[str, str]]:
    """One line each."""
    return [(name, _GLOSSARY[name]) for name in sorted(protocols) if name in _GLOSSARY]


def plural(count: int, noun: str) -> str:
    """`1 run`, `2,000 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def number(value: float) -> str:
    """Six digits, without an exponent below a million."""
    value += 0.0  # there is no -0
    return f"{value:,.0f}" if 999_999.5 <= abs(value) < 1e15 else f"{value:.6g}"


def score_text(score: Score) -> tuple[str, str]:
    """A score and its uncertainty, as in a leaderboard."""
    return text_of(score.value, cell_of(score))


def finite(value: Any) -> float | None:
    """What a file calls a number, if it can be drawn."""
    if type(value) not in (int, float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer of 400 digits
        return None
    return found if math.isfinite(found) else None


Natural = tuple[tuple[int, float, str], ...]


def in_order(record: Record) -> tuple[str, str, int, bool, int, Natural, int]:
    """Runs as people list them: the plain one first, then by the values of settings, 5 before 10; limited ones last."""
    parts = re.split(r"(\d+(?:\.\d+)?)", settings_text(record.overrides))
    natural = tuple((1, float(part), "") if place % 2 else (0, 0.0, part) for place, part in enumerate(parts))
    return (
        *(record.protocol, record.recipe, record.version, record.limited),
        *(deviating(record), natural, record.seed),
    )


def deviating(record: Record) -> int:
    """In how many settings a run is not the plain one."""
    if record.is_plain:
        return 0
    return len(record.overrides) + len(column_deviations(record).as_json().keys() - {"overrides"})
