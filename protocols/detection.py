"""Object detection and instance segmentation: COCO's box and mask AP of a detector trained on top of the network.

    ssl-bench run --ckpt x.pth --dataset coco --protocol detection              the first row below, SdAE's
    torchrun --nproc-per-node=8 -m ssl_bench.cli run --ckpt x.pth --dataset coco --protocol detection/cascade-moca
    ssl-bench run --ckpt x.pth --dataset toy-coco --protocol detection/maskrcnn-toy

Every weight is trained, by AdamW with a learning rate that falls from the detector to the patch projection. Mask R-CNN
and Cascade Mask R-CNN read four blocks through an FPN (iBOT's code, which CAE's and MOCA's settings come from), or the
last one through ViTDet's simple pyramid. The AP of the last step is reported, by pycocotools.

Departures of all rows: incomplete last batches are left out, and images are not grouped by their aspect ratio, as
everywhere here; boxes are cut at the image's border; images with crowds alone are left out of training, which COCO has
none of. Of iBOT's and CAE's: positions stay at the checkpoint's grid and are resized for each image (theirs: to 42 x 68
once, then for each image), and a patch of 8 px halves strides and anchors (theirs: one stage less of enlargement,
which keeps them). Of ViTDet's, whose code is detectron2: mmdet's cascade samples RoIs anew in every stage and
has a mask head in each, images are resized by OpenCV, and an epoch has COCO's 117,266 images with objects (theirs:
118,000).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ssl_bench.errors import UserError
from ssl_bench.evaluate.coco import Annotations, Coco
from ssl_bench.evaluate.readings import Reading
from ssl_bench.evaluate.splits import Integers, shown
from ssl_bench.evaluate.subject import Score, Scores, Subject
from ssl_bench.evaluate.training.loader import steps_per_epoch
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.training import about_replaced, check_batch, computed_apart, identity

if TYPE_CHECKING:
    from ssl_bench.protocols.openmm.runner import Data

VERSION = 1
DATA, DISTRIBUTED, KEEPS_SIZES = "boxes", True, True

BETAS = (0.9, 0.999)
MIN_SIDE_PX = 32  # of a training image, mmdet's


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one paper does it."""

    stage_weights: tuple[float, ...]  # of the losses; one stage: Mask R-CNN, several: Cascade Mask R-CNN
    blocks: tuple[int, ...]  # which are read, of 12, from 0: four for an FPN, one for the simple pyramid
    window: int  # patches a side within which most blocks attend, with relative positions; 0: all see the whole image
    positions: Literal["trained", "fixed"]
    norm: Literal["batch", "layer"]  # of the heads; batch: over all processes
    rpn_convs: int
    rpn_beta: float  # of the smooth L1 loss of its boxes; 0: L1
    border_px: int  # anchors that reach farther out of the image are not trained; -1: all are
    candidates: int  # boxes a scale in training, of which non-maximum suppression leaves proposals; val: at most 1000
    proposals: int  # an image in training; val: at most 1000
    rois: int  # an image and stage, of which a quarter shows objects
    box_loss: Literal["giou", "l1"]
    class_boxes: bool  # every class refines boxes by itself
    convs: int  # of the box head and of the mask head
    channels: int
    hidden: int  # width of the box head's linear layer
    # multi-scale: the shorter side is one of shorter_px, the longer one at most longer_px; multi-scale-crop: or that of
    # a random part; jitter: .1 to 2 times a square of longer_px, then a crop of it. Val: the largest of these sizes.
    augmentation: Literal["multi-scale", "multi-scale-crop", "jitter"]
    shorter_px: tuple[int, ...]
    longer_px: int
    epochs: int
    drop_epochs: tuple[float, ...]  # after each, the learning rate is divided by 10
    warmup_steps: int  # from a thousandth of the learning rate
    batch: int  # over all processes
    lr: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    source: str
    published: str

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 1 <= self.stages <= 3 or min(self.stage_weights) <= 0:
            raise UserError(f"stage_weights={self.stage_weights}: expected one to three numbers above 0.")
        if len(self.blocks) not in (1, 4) or not all(0 <= block < 12 for block in self.blocks):
            raise UserError(f"blocks={self.blocks}: expected four blocks of 0 to 11 (FPN) or one (simple pyramid).")
        if self.window and self.blocks != (11,):
            raise UserError(f"window={self.window}: a network of windows gives its last block alone; set blocks=11.")
        counts = ("rpn_convs", "candidates", "proposals", "rois", "channels", "hidden", "longer_px", "epochs", "batch")
        if wrong := next((name for name in counts if getattr(self, name) < 1), None):
            raise UserError(f"{wrong}={getattr(self, wrong)}: expected at least 1.")
        if wrong := next((name for name in _FROM_0 if getattr(self, name) < 0), None):
            raise UserError(f"{wrong}={getattr(self, wrong)}: expected 0 or more.")
        if not self.shorter_px or not 1 <= min(self.shorter_px) <= max(self.shorter_px) <= self.longer_px:
            raise UserError(
                f"shorter_px={self.shorter_px}: expected sides from 1 px to longer_px, which is {self.longer_px}."
            )
        if min(np.diff([0, *self.drop_epochs]), default=1) <= 0:
            raise UserError(f"drop_epochs={self.drop_epochs}: expected rising numbers above 0.")
        if self.lr <= 0 or not 0 < self.layer_decay <= 1 or not 0 <= self.drop_path < 1:
            raise UserError(
                f"lr={self.lr:g}, layer_decay={self.layer_decay:g}, drop_path={self.drop_path:g}: expected lr above 0, "
                "layer_decay above 0 and at most 1 (none), drop_path from 0 to below 1."
            )

    @property
    def stages(self) -> int:
        """How many times boxes are classified and refined."""
        return len(self.stage_weights)

    @property
    def selected_on(self) -> Literal["none"]:
        """The last step is reported."""
        return "none"


_FROM_0 = ("window", "rpn_beta", "convs", "warmup_steps", "weight_decay")
_SHORTER = tuple(range(480, 801, 32))

# bytedance/ibot evaluation/object_detection: cascade_mask_rcnn_vit_fpn.py, vit_base_giou_4conv1f_coco_3x.py, Swin's
# schedule_1x.py (warm-up), and the README's command for ViT-B: 12 epochs, layer decay .75, batch 8 x 2. No clipping.
_IBOT = Recipe(
    stage_weights=(1.0, 0.5, 0.25), blocks=(3, 5, 7, 11), window=0, positions="trained", norm="batch", rpn_convs=1,
    rpn_beta=1 / 9, border_px=0, candidates=2000, proposals=2000, rois=512, box_loss="giou", class_boxes=True, convs=4,
    channels=256, hidden=1024, augmentation="multi-scale-crop", shorter_px=_SHORTER, longer_px=1333, epochs=12,
    drop_epochs=(8.0, 11.0), warmup_steps=500, batch=16, lr=1e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0.2,
    source="bytedance/ibot evaluation/README.md and its configs",
    published="COCO: iBOT ViT-B/16 box 51.2, mask 44.2 (TEC Table 7, MOCA Table 13)",
)  # fmt: skip
# lxtGH/CAE downstream_tasks/detection, built on iBOT's: vit_base_giou_4conv1f_coco_maskrcnn_1x_cae_sincos_init0.1_
# lr00003.py on mask_rcnn_vit_fpn.py, 16 GPUs x 2. Its layer scale of .1 is CAE's own: no network gets one here.
_CAE = replace(
    _IBOT, stage_weights=(1.0,), positions="fixed", rpn_beta=0.0, border_px=-1, drop_epochs=(9.0, 11.0), batch=32,
    lr=3e-4,
)  # fmt: skip
# facebookresearch/detectron2 projects/ViTDet: cascade_mask_rcnn_vitdet_b_100ep.py, mask_rcnn_vitdet_b_100ep.py,
# coco_loader_lsj.py; steps 163,889 and 177,546 of 184,375. Its stages all weigh 1, with gradients of a third into the
# pyramid, and there is one mask loss: thirds give the pyramid the same, and AdamW's steps do not depend on the scale.
_VITDET = replace(
    _IBOT, stage_weights=(1 / 3, 1 / 3, 1 / 3), blocks=(11,), window=14, norm="layer", rpn_convs=2, rpn_beta=0.0,
    border_px=-1, proposals=1000, box_loss="l1", class_boxes=False, augmentation="jitter", shorter_px=(1024,),
    longer_px=1024, epochs=100, drop_epochs=(800 / 9, 2600 / 27), warmup_steps=250, batch=64, weight_decay=0.1,
    layer_decay=0.7, drop_path=0.1,
)  # fmt: skip
# Features of small networks that were trained for minutes differ in scale by ten: the heads' layer norm copes.
_TOY = replace(
    _CAE, positions="trained", norm="layer", candidates=100, proposals=50, rois=32, convs=1, channels=32, hidden=128,
    augmentation="multi-scale", shorter_px=(96,), longer_px=96, epochs=2, drop_epochs=(1.6,), warmup_steps=20, batch=4,
    lr=2e-3, layer_decay=0.9, drop_path=0.0, source="ours: seconds on the toy world", published="none",
)  # fmt: skip


def _row(base: Recipe, source: str, published: str, **changes: Any) -> Recipe:
    return replace(base, source=source, published=published, **changes)


# fmt: off
RECIPES: dict[str, Recipe] = {
    "maskrcnn-sdae":      _row(_CAE, "SdAE A.1 and Table 4; lxtGH/CAE downstream_tasks/detection",
                               "COCO: SdAE ViT-B/16 box 48.9, mask 43.0; CAE 48.0, 42.3; MAE 45.4, 40.6 (Table 4)"),
    # 12 epochs of Mask R-CNN are all that the paper says, and its README: CAE's code, without class token, which reads
    # finished patches and so takes no part in their maps. The rest is CAE's (assumption).
    "maskrcnn-extrema":   _row(_CAE, "ExtreMA 5.3 and Table 11; microsoft/ExtreMA README; lxtGH/CAE",
                               "COCO: ExtreMA ViT-B/16 box 47.5, mask 42.0; 22k 48.5, 42.7 (Table 11)"),
    # Not stated, and iBOT's, whose configuration it says is similar (assumption): batch, weight decay, layer decay,
    # drop path, crops.
    "cascade-moca":       _row(_IBOT, "MOCA A.5 and Table 13; bytedance/ibot",
                               "COCO: MOCA ViT-B/16 box 50.5, mask 43.6; iBOT 51.2, 44.2; DINO 50.1, 43.4 (Table 13)",
                               lr=2e-4),
    "cascade-ibot":       _IBOT,
    # "With no change" (TEC C).
    "cascade-tec-ibot":   _row(_IBOT, "TEC Table 7, first half; bytedance/ibot",
                               "COCO: TEC on iBOT ViT-B/16 box 52.7, mask 45.4; iBOT 51.2, 44.2 (Table 7)"),
    "cascade-tec-vitdet": _row(_VITDET, "TEC Table 7, second half; facebookresearch/detectron2 projects/ViTDet",
                               "COCO: TEC on MAE ViT-B/16 box 54.4, mask 47.1; MAE 54.0, 46.7 (Table 7)"),

    "maskrcnn-toy":       _TOY,
    "cascade-toy":        replace(_TOY, stage_weights=(1.0, 0.5, 0.25), rois=16, epochs=2, drop_epochs=(1.6,)),
    "vitdet-toy":         replace(_TOY, blocks=(11,), window=6, rpn_convs=2, box_loss="l1"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """None: it reads images itself."""
    return {}


def check(subject: Subject, recipe: Recipe) -> None:
    """What the recipe needs of the machine, of the network and of the data."""
    packages.installed()
    checkpoint, coco = subject.checkpoint, subject.dataset
    assert isinstance(coco, Coco)
    if checkpoint.format == "pixels":
        raise UserError("pixels: has no weights to train; give a checkpoint, or random:vit_base_patch16_224.")
    patch = checkpoint.architecture.patch_px
    if patch % 4:
        raise UserError(
            f"{checkpoint.spec} has patches of {patch} px. Expected a multiple of 4, for the finest scale of the "
            "detector is a quarter of the patch; give a checkpoint with patches of 16 or 8 px."
        )
    if recipe.augmentation == "jitter" and recipe.longer_px % (2 * patch):
        raise UserError(
            f"longer_px={recipe.longer_px}: expected a multiple of {2 * patch}, twice the patch of {checkpoint.spec}, "
            "since images are padded to squares of that side; set another longer_px and shorter_px."
        )
    if subject.effort.dtype == "fp16" and not subject.effort.device.startswith("cuda"):
        raise UserError(f"--dtype fp16 trains on CUDA only (device {subject.effort.device}); use bf16 or fp32.")
    _check_val(subject, coco)
    subject.split("train")
    _check_outlines(coco, "train")
    chosen = choose(coco.annotations["train"])
    if not len(chosen.images):
        raise UserError(
            f"{coco.files['train']} has no image to learn from: expected some with at least one object that is no "
            f"crowd, and sides of at least {MIN_SIDE_PX} px. Complete it, or take more images (--limit)."
        )
    check_batch(len(chosen.images), recipe.batch)
    steps = recipe.epochs * steps_per_epoch(len(chosen.images), recipe.batch)
    if recipe.warmup_steps >= steps:
        raise UserError(
            f"warmup_steps={recipe.warmup_steps}, and {recipe.epochs} epochs of {len(chosen.images):,} images are "
            f"{steps:,} steps: the warm-up would never end. Choose a shorter one (--set warmup_steps=...) or more "
            "epochs."
        )


def data_used(subject: Subject, recipe: Recipe) -> dict[str, str]:
    """BatchNorm and the means of losses are of what is computed at a time: part of the run's identity."""
    return computed_apart(recipe.batch, subject.effort)


def _check_val(subject: Subject, coco: Coco) -> None:
    subject.split("val")
    file = coco.files["val"]
    if bad := coco.without_extent["val"]:
        raise UserError(
            f"{file}: {len(bad):,} boxes have no extent within their image: "
            f"{shown(f'annotation {each}' for each in bad)}. Expected a width and a height above 0, since nothing can "
            "overlap such an object and AP would be wrong; mend or remove these annotations."
        )
    if coco.annotations["val"].crowd.all():  # or there are none
        raise UserError(
            f"{file} has no object in its {len(subject.split('val')):,} images but crowds, so there is nothing to "
            "find. Complete it, or take more images (--limit)."
        )
    _check_outlines(coco, "val")


def _check_outlines(coco: Coco, split: str) -> None:
    """Masks are trained and scored, so every object must have one; and val none that pycocotools takes for a box."""
    found, file = coco.annotations[split], coco.files[split]
    is_area = np.diff(found.outlines.ends, prepend=0) >= 6  # x, y of three corners or more
    corners = np.concatenate([[0], np.cumsum(is_area)])
    polygons, areas = np.diff(found.outlines.bounds), np.diff(corners[found.outlines.bounds])
    runs = list(found.outlines.runs)
    polygons[runs], areas[runs] = 1, 1
    wrong = areas == 0 if split == "train" else (areas == 0) | (areas < polygons)
    if without := found.id[wrong].tolist():
        named = shown(f"annotation {each}" for each in without)
        raise UserError(
            f"{file}: {len(without):,} objects have no segmentation, or one of fewer than three corners: {named}. "
            "Masks are trained and scored beside boxes, so expected polygons (of three corners or more) or run lengths "
            "for each; complete the file, or remove these annotations."
        )


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is learned from."""

    images: Integers  # places in the split
    usable: npt.NDArray[np.bool_]  # (n,) of the objects; crowds are not
    small: int  # images below MIN_SIDE_PX that have such objects
    empty: int  # images without any
    thin: int  # objects narrower than a pixel, or of no area


def choose(found: Annotations) -> Chosen:
    """As mmdet does it: objects of at least a pixel; images with at least one of them, and not too small."""
    thin = ((found.box[:, 2:] < 1).any(axis=1) | (found.area <= 0)) & ~found.crowd
    usable = ~thin & ~found.crowd
    counts = np.bincount(found.image[usable], minlength=len(found.size_px))
    small = found.size_px.min(axis=1) < MIN_SIDE_PX
    return Chosen(
        images=np.flatnonzero((counts > 0) & ~small),
        usable=usable,
        small=int((small & (counts > 0)).sum()),
        empty=int((counts == 0).sum()),
        thin=int(thin.sum()),
    )


def lr_factor(recipe: Recipe, per_epoch: int) -> Callable[[int], float]:
    """mmcv's schedule: linear warm-up from a thousandth, times a tenth from every drop on."""
    drops = [round(epoch * per_epoch) for epoch in recipe.drop_epochs]

    def factor(step: int) -> float:
        warm = 1.0 if step >= recipe.warmup_steps else 1 - (1 - step / recipe.warmup_steps) * (1 - 0.001)
        return warm * 0.1 ** sum(step >= drop for drop in drops)

    return factor


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Train; the AP of the last step."""
    packages.require()
    import torch

    from ssl_bench.protocols.openmm import runner
    from ssl_bench.protocols.openmm.network import parameter_groups

    coco = subject.dataset
    assert isinstance(coco, Coco)
    chosen, config = choose(coco.annotations["train"]), resolved(subject, recipe)
    per_epoch = steps_per_epoch(len(chosen.images), recipe.batch)
    network: Any = runner.build(config["model"], scope="mmdet", seed=subject.seed)
    network.backbone.load(subject.checkpoint)
    if recipe.positions == "fixed" and network.backbone.trunk.vit.pos_embed is not None:
        network.backbone.trunk.vit.pos_embed.requires_grad_(False)
    groups = parameter_groups(network, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    course = runner.Course(
        title=f"detection with {subject.checkpoint.name}",
        identity=identity(subject, subject.split("train"), recipe, f"detection@v{VERSION}"),
        steps=recipe.epochs * per_epoch,
        batch=recipe.batch,
        seed=subject.seed,
    )
    history = runner.train(
        network,
        course,
        prepared(coco, chosen, config),
        optimizer=torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS),
        lr_factor=lr_factor(recipe, per_epoch),
        effort=subject.effort,
    )
    scores = scored(coco, chosen, history.outcomes[-1], broken=len(history.broken))
    replaced = len(history.replaced)
    scores = replace(
        scores, warnings=(*scores.warnings, *about_replaced(replaced)), skipped={**scores.skipped, "train": replaced}
    )
    runner.forget(course, subject.effort)
    details = {**scores.details, "steps": course.steps}
    return replace(scores, details=details, files={"mm_config.json": runner.config_json(config)})


def resolved(subject: Subject, recipe: Recipe) -> dict[str, Any]:
    """All that mmdet is given, as it stands in mm_config.json."""
    from ssl_bench.protocols.openmm import objects
    from ssl_bench.protocols.openmm.detectors import detector

    assert isinstance(subject.dataset, Coco)
    return {
        "model": detector(recipe, subject.checkpoint.architecture, len(subject.dataset.categories)),
        "train_pipeline": objects.training_transforms(recipe),
        "val_pipeline": objects.val_transforms(recipe),
        "classes": subject.dataset.categories,
    }


def prepared(coco: Coco, chosen: Chosen, config: Mapping[str, Any]) -> Data:
    """The samples of both splits, and what scores them."""
    from ssl_bench.protocols.openmm import coco_ap, objects, runner

    train, val = coco.splits["train"], coco.splits["val"]
    learned = objects.Learned(coco.annotations["train"], chosen.usable)
    return runner.Data(
        train=objects.Objects(train, config["train_pipeline"], coco.categories, images=chosen.images, learned=learned),
        val=objects.Objects(val, config["val_pipeline"], coco.categories, images=np.arange(len(val))),
        metric=coco_ap.CocoAP(coco.files["val"], val.sample_ids),
    )


def scored(coco: Coco, chosen: Chosen, outcome: Mapping[str, Any], *, broken: int) -> Scores:
    """What the metric said, and what was left out."""
    val = len(coco.splits["val"]) - broken
    train, names = coco.annotations["train"], np.array(coco.categories)
    warnings = []
    if bad := coco.without_extent["train"]:
        warnings.append(
            f"{len(bad):,} training objects have boxes without extent and were left out: "
            f"{shown(f'annotation {each}' for each in bad)}"
        )
    if unseen := names[np.bincount(train.category[chosen.usable], minlength=len(names)) == 0].tolist():
        warnings.append(f"{len(unseen):,} categories have no object to learn from: {shown(unseen)}")
    return Scores(
        {name: Score(value, val) for name, value in outcome.items() if isinstance(value, float) and name != "main"},
        main="box_ap",
        warnings=tuple(warnings),
        details={
            **{name: value for name, value in outcome.items() if isinstance(value, dict)},
            "categories": len(names),
            "train_images_left_out": {"without_objects": chosen.empty, "small": chosen.small},
            "train_objects_left_out": {"thin": chosen.thin, "without_extent": len(coco.without_extent["train"])},
            "train_crowds_ignored": int(train.crowd.sum()),
        },
        evaluated={"train": len(chosen.images), "val": val},
        skipped={"train": 0, "val": broken},
    )
