"""Video object segmentation: do patch tokens follow the objects that are marked in the first frame?

    ssl-bench run --ckpt x.pth --protocol davis --dataset davis-2017
    ssl-bench run --ckpt x.pth --protocol davis --dataset toy-davis --set radius=6

Masks are passed on from frame to frame to similar tokens, with nothing trained (protocols/propagation.py), and
compared with the true ones (evaluate/video_measures.py). Jabri et al. 2020 propose it, DINO's script is what everybody
runs, MMC's Table 2 among them.

    jf_mean                     the mean of j_mean and f_mean
    j_mean, j_recall, j_decay   region similarity, mean over objects of: the mean over frames, the share of frames above
                                .5, and what is lost from the first quarter of the frames to the last
    f_mean, f_recall, f_decay   boundary accuracy
    grid_bound                  jf_mean of the true masks shrunk to the grid of tokens and enlarged again

The first and the last frame of a video are not counted. Every mask is written beside the record, as
masks/VIDEO/00000.png with a palette, which davis2017-evaluation reads, and for some videos a strip of four frames as
overlays/VIDEO.png: colors are what was found, white lines what is true.

Departures from the script: frames are resized by the same rule (bilinear, no antialiasing, to 8 bits), but not by
OpenCV, whose fixed-point arithmetic differs by a gray level here and there. For square frames the script's read_seg
turns the grid by 90 degrees against that of read_frame; here masks follow the frames. Void (255) in a first mask is
background, as it is for davis2017-evaluation, and not object number 255. An object with the same share everywhere does
not take the whole frame (hard_mask). A network that was not trained with ImageNet's mean and standard deviation keeps
its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (everybody's name for it)
from PIL import Image
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import IMAGENET_MEAN, IMAGENET_STD
from ssl_bench.evaluate.features import DTYPES
from ssl_bench.evaluate.hardware import choose_attention
from ssl_bench.evaluate.loading import load
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.splits import shown
from ssl_bench.evaluate.subject import Score, Scores, Subject
from ssl_bench.evaluate.video_masks import PALETTE, Mask, mask_png
from ssl_bench.evaluate.video_measures import Summary, boundaries, measure_frame, summary
from ssl_bench.evaluate.videos import Objects, Video, Videos, read_objects
from ssl_bench.progress import bar
from ssl_bench.protocols.propagation import Rule, hard_mask, propagated, soft_mask

VERSION = 1
DATA, DISTRIBUTED = "videos", False
KEEPS_SIZES = True


@dataclass(frozen=True)
class Recipe:
    """How frames are shown to the network, and how masks are passed on."""

    short_side_px: int
    multiple_px: int  # the long side is cut down to a multiple of it
    frames: int  # the last ones, from which masks are taken, beside the first one
    radius: int  # in tokens
    topk: int
    temperature: float
    norm: bool  # the network's final norm
    normalization: Literal["dino", "own"]  # of pixels: ImageNet's with DINO's .228 for red, or the checkpoint's
    position_resize: Literal["dino", "own"]  # of position embeddings: DINO's, or the checkpoint's
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("short_side_px", "multiple_px", "radius", "topk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.frames < 0:
            raise UserError(f"frames={self.frames}: expected 0 (the first frame alone) or more.")
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: expected more than 0.")
        if self.multiple_px > self.short_side_px:
            raise UserError(
                f"multiple_px={self.multiple_px} is more than short_side_px={self.short_side_px}, and a long side "
                "might come out as 0; choose a smaller one."
            )

    @property
    def selected_on(self) -> Literal["none"]:
        """Nothing is chosen by its result."""
        return "none"

    def rule(self, length: int) -> Rule:
        """Who passes masks on to whom in a video of so many frames."""
        return Rule(min(self.frames, max(length - 2, 0)), self.radius, self.topk, self.temperature)

    def grid_px(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the network sees. Of a square frame the width is the long side, as in the script."""
        short = self.short_side_px
        if height > width:
            return short, short * height // width // self.multiple_px * self.multiple_px
        return short * width // height // self.multiple_px * self.multiple_px, short


# fmt: off
RECIPES: dict[str, Recipe] = {
    #               side multiple frames radius topk temperature norm normalization position
    # iBOT's script is a copy. Both write std (.228, .224, .225), and have DINO's network resize the positions.
    "dino": Recipe(480,  64,      7,     12,    5,   0.1,        True, "dino", "dino",
                   source="facebookresearch/dino eval_video_segmentation.py; bytedance/ibot, the same; MMC, Table 2",
                   published="J&F / J / F, MMC Table 2: DINO ViT-B/16 62.3 / 60.7 / 63.9, MMC 63.8 / 61.8 / 65.6; "
                             "on ImageNet-100, ViT-S/16: DINO 57.7, iBOT 59.7, MMC 60.3"),
    # Frames of 96 px, enlarged to 18 x 24 tokens of 8 px: on fewer, little would be left of the objects.
    "toy":  Recipe(144,  48,      7,     6,     5,   0.1,        True, "own",  "own",
                   source="ours: the first row, for the toy world's frames of 96 px", published="none"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """Nothing of the cache, which holds one vector an image."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """A network that takes these sizes, and videos that fit together."""
    architecture, spec = subject.checkpoint.architecture, subject.checkpoint.spec
    patch = architecture.patch_px
    for name in ("short_side_px", "multiple_px"):
        if (value := getattr(recipe, name)) % patch:
            fitting = max(value // patch, 1) * patch
            raise UserError(
                f"{name}={value} does not divide into patches of {patch} px ({spec}); try --set {name}={fitting}."
            )
    if recipe.norm and not architecture.final_norm:
        raise UserError(f"{spec} has no final norm. Leave it out: --set norm=false.")
    if subject.effort.skip_broken:
        raise UserError(
            "--skip-broken: a video without some of its frames is another benchmark. Expected all to be readable; "
            "fetch the broken ones again."
        )
    videos = _videos(subject)
    split = _split(subject)
    videos.verify(split)
    for video in videos.videos[split]:
        read_objects(video)


def _videos(subject: Subject) -> Videos:
    assert isinstance(subject.dataset, Videos)
    return subject.dataset


def _split(subject: Subject) -> str:
    """`val`; of a dataset without one the test split, whose masks an evaluation server has."""
    there = [name for name in ("val", "test-dev", "test-challenge") if name in subject.dataset.splits]
    return there[0] if there else subject.split("val").name  # the latter says that there is none


# Tokens --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A frame at the size that the network sees, by OpenCV's bilinear rule: without antialiasing, in 8 bits."""

    recipe: Recipe

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """uint8 (3, H, W)"""
        width, height = self.recipe.grid_px(*image.size)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
        return resized[0].round().to(torch.uint8).numpy()


def _normalization(subject: Subject, recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    architecture = subject.checkpoint.architecture
    as_trained = (architecture.mean, architecture.std)
    if recipe.normalization == "own" or as_trained != (IMAGENET_MEAN, IMAGENET_STD):
        return as_trained
    return IMAGENET_MEAN, (0.228, *IMAGENET_STD[1:])  # sic


def _tokens(subject: Subject, recipe: Recipe, split: str, videos: Sequence[Video]) -> Iterator[Tensor]:
    """The patch tokens of every frame of every video in turn, (H, W, D) each; a batch of frames in memory at a time."""
    backbone, device = subject.backbone, subject.effort.device
    patch = backbone.architecture.patch_px
    # On a CPU a frame's activations fill its cache; the tokens of a batch wait here until masks have been passed on.
    batch = subject.effort.batch_size or (1 if device == "cpu" else 8)
    choose_attention(backbone.modules(), device=device, tokens=(recipe.short_side_px // patch) ** 2)
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in _normalization(subject, recipe))
    plan = [list(video.frames[at : at + batch]) for video in videos for at in range(0, len(video.frames), batch)]
    source, effort = subject.split(split), dataclasses.replace(subject.effort, skip_broken=True)
    dtype = DTYPES[subject.effort.dtype]
    # Any object with `pixels` serves as a view.
    for indices, (pixels, broken) in zip(plan, load(source, _View(recipe), plan, effort), strict=True):  # type: ignore[arg-type]
        if pixels is None or broken:
            source.image(indices[broken[0]])  # says what is wrong
            raise UserError(f"{source.sample_ids[indices[broken[0]]]} could not be read at first, and now it can.")
        images = pixels.to(device).float().div_(255).sub_(mean).div_(std)
        with torch.inference_mode(), torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            tokens = backbone(images, norm=recipe.norm).tokens[0].patches.float()
        if not tokens.isfinite().all():
            raise UserError(
                f"tokens of {subject.checkpoint.name} are not finite, of {source.sample_ids[indices[0]]} or a frame "
                "soon after. Are there NaN in the weights? With fp16 try bf16 or fp32."
            )
        yield from tokens


@contextlib.contextmanager
def _positions_resized(subject: Subject, recipe: Recipe) -> Iterator[None]:
    """The network as the script builds it: whatever the weights, their positions are resized by DINO's rule."""
    backbone = subject.backbone
    own = backbone.architecture
    if recipe.position_resize == "dino" and subject.checkpoint.format != "pixels":
        backbone.architecture = dataclasses.replace(own, position_resize="dino")
    try:
        yield
    finally:
        backbone.architecture = own


# Videos --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Followed:
    """One video: its masks as found, and how good they are; no measures where nothing can be compared."""

    video: Video
    objects: Objects
    grid: tuple[int, int]
    lost: tuple[int, ...]  # objects that no token shows in the first frame
    found: list[Mask]
    j: list[Summary]
    f: list[Summary]
    bound: list[float]  # J&F of the true masks, shrunk and enlarged


def follow(subject: Subject, recipe: Recipe) -> Iterator[Followed]:
    """Every video of the split in turn."""
    dataset, split = _videos(subject), _split(subject)
    videos, patch = dataset.videos[split], subject.checkpoint.architecture.patch_px
    tokens = _tokens(subject, recipe, split, videos)
    total = sum(len(video.frames) for video in videos)
    with _positions_resized(subject, recipe), bar(f"following objects of {dataset.name}", total) as advance:
        for video in videos:
            objects = read_objects(video)
            height, width = objects.first.shape
            grid_width, grid_height = (side // patch for side in recipe.grid_px(width, height))
            first = soft_mask(objects.first, objects.count, (grid_height, grid_width))
            own = itertools.islice(tokens, len(video.frames))
            found = [objects.first]
            advance(1)
            with torch.inference_mode():
                for soft in propagated(own, first.to(subject.effort.device), recipe.rule(len(video.frames))):
                    found.append(hard_mask(soft, patch, (width, height)))
                    advance(1)
            present = first.amax(dim=(0, 1)).tolist()
            lost = tuple(k for k in range(1, 1 + objects.count) if not present[k] and k not in objects.absent)
            measures = _measured(objects, found, (grid_height, grid_width), patch)
            yield Followed(video, objects, (grid_height, grid_width), lost, found, *measures)


def _measured(
    objects: Objects, found: Sequence[Mask], grid: tuple[int, int], patch: int
) -> tuple[list[Summary], list[Summary], list[float]]:
    """J and F of every object, and the grid's bound; nothing where there is no frame between the first and the last."""
    values, bounds = [], []
    for frame in range(1, len(objects.video.masks)):
        truth = objects.mask(frame)
        if frame == len(found) - 1:
            break  # it was read for what appears in it, and is not counted
        values.append(measure_frame(truth, found[frame], objects.count))
        shrunk = hard_mask(soft_mask(truth, objects.count, grid), patch, truth.shape[::-1])
        bounds.append(measure_frame(truth, shrunk, objects.count))
    if not values:
        return [], [], []
    j, f = ([summary(np.array(each)) for each in zip(*measure, strict=True)] for measure in zip(*values, strict=True))
    return j, f, np.array(bounds).mean(axis=(0, 1)).tolist()


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Follow the objects of all videos, measure, and write the masks."""
    followed: list[Followed] = []
    files: dict[str, bytes] = {}
    split = _split(subject)
    for each in follow(subject, recipe):
        for stem, mask in zip(each.video.stems, each.found, strict=True):
            files[f"masks/{each.video.name}/{stem}.png"] = mask_png(mask)
        if len(followed) < OVERLAYS:
            files[f"overlays/{each.video.name}.png"] = overlay(each, subject)
        each.found.clear()  # they are in the files now
        followed.append(each)
    details = {
        "split": split,
        "not_counted": [each.video.name for each in followed if not each.j],
        "normalization": dict(zip(("mean", "std"), _normalization(subject, recipe), strict=True)),
        "videos": {each.video.name: _described(each) for each in followed},
    }
    frames = sum(len(each.video.frames) for each in followed)
    metrics, main = _metrics(followed), "jf_mean"
    if not metrics:  # test-dev: the masks are for the evaluation server
        metrics, main = {"frames_followed": Score(float(frames), len(followed))}, "frames_followed"
    warnings, evaluated = _warnings(followed), {split: frames}
    return Scores(metrics, main, details=details, warnings=warnings, files=files, evaluated=evaluated)


def _warnings(followed: Sequence[Followed]) -> tuple[str, ...]:
    """What makes a score another than it seems to be, in totals."""
    unscored = sum(not each.j for each in followed)
    total = sum(each.objects.count for each in followed)
    lost = sum(len(each.lost) for each in followed)
    absent = sum(len(each.objects.absent) for each in followed)
    late = sum(len(each.objects.late) for each in followed)
    void = [f"{each.video.name}/{each.video.stems[k]}" for each in followed for k in sorted(each.objects.only_void)]
    merged = sum(each.video.merged and len(each.objects.numbers) > 1 for each in followed)
    told = {
        f"{unscored} of {len(followed)} videos have nothing to compare with: masks of their first frame alone, or no "
        "frame between the first and the last. Their masks are written, and they count nowhere.": unscored,
        f"{lost} of {total} objects cover the middle of no token in the first frame, and cannot be followed; {absent} "
        f"of {total} objects are numbers that the first mask lacks, and each counts 100 where it is absent, as in "
        f"davis2017-evaluation; {late} more appear later, and count as background.": lost + absent + late,
        f"{len(void)} masks show nothing but 255, which is void, though the first mask of their video has none "
        f"({shown(void)}). Objects count as absent there; if 255 is meant for one, give it its number.": len(void),
        f"{merged} of {len(followed)} videos have several objects, taken as one. Where DAVIS 2017 annotated more of "
        "them than DAVIS 2016, this is not the benchmark of 2016.": merged,
    }
    return tuple(text for text, count in told.items() if count)


def _metrics(followed: Sequence[Followed]) -> dict[str, Score]:
    """Means over all objects of all videos alike, as davis2017-evaluation has it."""
    rows = [row for each in followed for row in _values(each)]
    return {name: _mean([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _values(each: Followed) -> list[dict[str, float]]:
    """Of every object of a video, all measures by name; of none where nothing was compared."""
    rows = []
    for j, f, bound in zip(each.j, each.f, each.bound, strict=True):
        named = {f"{letter}_{name}": value for letter, of in (("j", j), ("f", f)) for name, value in vars(of).items()}
        rows.append({"jf_mean": (j.mean + f.mean) / 2, **named, "grid_bound": bound})
    return rows


def _mean(shares: Sequence[float]) -> Score:
    """In percent, with the standard error over objects (ddof 1)."""
    values = 100 * np.array(shares)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(float(values.mean()), len(values), stderr=error)


def _described(each: Followed) -> dict[str, object]:
    """Of one video, for the record."""
    return {
        "frames": len(each.video.frames),
        "grid": list(each.grid),
        "objects": [{name: round(100 * value, 4) for name, value in row.items()} for row in _values(each)],
        "objects_without_a_token_in_the_first_frame": list(each.lost),
        "numbers_that_the_first_mask_lacks": list(each.objects.absent),
        "objects_that_appear_later": sorted(each.objects.late),
    }


# Pictures ------------------------------------------------------------------------------------------------------------

OVERLAYS = 8  # videos of which a strip is drawn
_STRIP = 4  # frames of it
_STRIP_PX = 240  # their height


def overlay(each: Followed, subject: Subject) -> bytes:
    """A few frames from the first to the last, with what was found in color, and what is true as white lines; PNG."""
    split, parts = subject.split(_split(subject)), []
    for frame in np.linspace(0, len(each.found) - 1, min(_STRIP, len(each.found))).round().astype(int).tolist():
        image, found = split.image(each.video.frames[frame]), each.found[frame]
        pixels = np.asarray(image).copy()
        pixels[found > 0] = (pixels[found > 0] * 0.5 + PALETTE[found[found > 0]] * 0.5).astype(np.uint8)
        size = round(_STRIP_PX * image.width / image.height), _STRIP_PX
        part = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        if frame < len(each.video.masks):
            truth = Image.fromarray(each.objects.mask(frame)).resize(size, Image.Resampling.NEAREST)
            part.paste((255, 255, 255), mask=Image.fromarray(boundaries(np.asarray(truth)) > 0))
        parts.append(part)
    strip = Image.new("RGB", (sum(part.width for part in parts), _STRIP_PX))
    for place, part in enumerate(parts):
        strip.paste(part, (place * part.width, 0))
    strip.save(content := io.BytesIO(), format="PNG")
    return content.getvalue()
