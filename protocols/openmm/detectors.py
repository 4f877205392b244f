"""Mask R-CNN and Cascade Mask R-CNN on a plain transformer, as mmdet's configs.

He et al. 2017 (arXiv:1703.06870), Cai and Vasconcelos 2019 (arXiv:1906.09756). What no recipe changes is what iBOT's,
CAE's and ViTDet's configs have in common: anchors of 8 strides and three ratios, assignment, non-maximum suppression,
RoIs of 7 and masks of 14 x 14. All strides are shares of the patch: 4 to 64 pixels with patches of 16, half with 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmdet.models import (
    FPN,
    CascadeRCNN,
    CascadeRoIHead,
    ConvFCBBoxHead,
    DetDataPreprocessor,
    FCNMaskHead,
    MaskRCNN,
    RPNHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.losses import CrossEntropyLoss, GIoULoss, L1Loss, SmoothL1Loss
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler

from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.protocols.openmm.network import Network, WindowedNetwork, layers_of
from ssl_bench.protocols.openmm.pyramids import Chain, LayerNorm2d, SimplePyramid, UpDown

if TYPE_CHECKING:
    from ssl_bench.protocols.detection import Recipe

Config = dict[str, Any]

SCALES = 5  # of the pyramid; RoIs are read from the first four
_IOU = (0.5, 0.6, 0.7)  # from which a box counts as an object, by stage
_STDS = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))  # of the offsets of centers, and of sides, by stage


def detector(recipe: Recipe, architecture: Architecture, classes: int) -> Config:
    """The whole model."""
    mean, std = ([255 * value for value in values] for values in (architecture.mean, architecture.std))
    stages = [_training(recipe, stage) for stage in range(recipe.stages)]
    return {
        "type": CascadeRCNN if recipe.stages > 1 else MaskRCNN,
        "data_preprocessor": {
            "type": DetDataPreprocessor,
            "mean": mean,
            "std": std,
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": _divisor(recipe, architecture.patch_px),
        },
        "backbone": _backbone(recipe, architecture),
        "neck": _neck(recipe, architecture.dim),
        "rpn_head": _rpn(recipe, architecture.patch_px),
        "roi_head": _roi_head(recipe, architecture.patch_px, classes),
        "train_cfg": {
            "rpn": {
                "assigner": _assigner(0.7, 0.3, low_quality=True),
                "sampler": _sampler(256, 0.5, add_objects=False),
                "allowed_border": recipe.border_px,
                "pos_weight": -1,
                "debug": False,
            },
            "rpn_proposal": _proposals(recipe.candidates, recipe.proposals),
            "rcnn": stages if recipe.stages > 1 else stages[0],
        },
        "test_cfg": {
            "rpn": _proposals(min(1000, recipe.candidates), min(1000, recipe.proposals)),
            "rcnn": {
                "score_thr": 0.05,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": 100,
                "mask_thr_binary": 0.5,
            },
        },
    }


def _proposals(candidates: int, kept: int) -> Config:
    nms = {"type": "nms", "iou_threshold": 0.7}
    return {"nms_pre": candidates, "max_per_img": kept, "nms": nms, "min_bbox_size": 0}


def _divisor(recipe: Recipe, patch_px: int) -> int:
    """Of the sides of a batch: the stride of the fourth scale, 32 with patches of 16; jittered images are squares."""
    return recipe.longer_px if recipe.augmentation == "jitter" else 2 * patch_px


def _backbone(recipe: Recipe, architecture: Architecture) -> Config:
    if recipe.window:
        return {
            "type": WindowedNetwork,
            "architecture": architecture,
            "image_px": recipe.longer_px,
            "window": recipe.window,
            "drop_path": recipe.drop_path,
        }
    return {
        "type": Network,
        "architecture": architecture,
        "layers": layers_of(recipe.blocks, architecture.depth),
        "norm": False,
        "drop_path": recipe.drop_path,
        "position_resize": "bicubic",
    }


def _neck(recipe: Recipe, dim: int) -> Config:
    if len(recipe.blocks) == 1:
        return {"type": SimplePyramid, "dim": dim, "out_channels": recipe.channels}
    levels = {"type": FPN, "in_channels": [dim] * 4, "out_channels": recipe.channels, "num_outs": SCALES}
    return {"type": Chain, "necks": [{"type": UpDown, "dim": dim, "norm": "SyncBN"}, levels]}


def _rpn(recipe: Recipe, patch_px: int) -> Config:
    loss = {"type": SmoothL1Loss, "beta": recipe.rpn_beta} if recipe.rpn_beta else {"type": L1Loss}
    return {
        "type": RPNHead,
        "in_channels": recipe.channels,
        "feat_channels": recipe.channels,
        "num_convs": recipe.rpn_convs,
        "anchor_generator": {
            "type": AnchorGenerator,
            "scales": [8],
            "ratios": [0.5, 1.0, 2.0],
            "strides": _strides(patch_px),
        },
        "bbox_coder": {"type": DeltaXYWHBBoxCoder, "target_means": [0.0] * 4, "target_stds": [1.0] * 4},
        "loss_cls": {"type": CrossEntropyLoss, "use_sigmoid": True, "loss_weight": 1.0},
        "loss_bbox": {**loss, "loss_weight": 1.0},
    }


def _strides(patch_px: int) -> list[int]:
    return [patch_px // 4 * 2**scale for scale in range(SCALES)]


def _roi_head(recipe: Recipe, patch_px: int, classes: int) -> Config:
    boxes = [_box_head(recipe, classes, stage) for stage in range(recipe.stages)]
    # LayerNorm is in both heads, batch norm in the boxes' alone: so in ViTDet's configs, and in iBOT's and CAE's.
    norm = {"type": LayerNorm2d, "eps": 1e-6} if recipe.norm == "layer" else None
    common = {
        "bbox_roi_extractor": _extractor(recipe, patch_px, 7),
        "mask_roi_extractor": _extractor(recipe, patch_px, 14),
        "mask_head": {
            "type": FCNMaskHead,
            "num_convs": recipe.convs,
            "in_channels": recipe.channels,
            "conv_out_channels": recipe.channels,
            "num_classes": classes,
            "norm_cfg": norm,
            "loss_mask": {"type": CrossEntropyLoss, "use_mask": True, "loss_weight": 1.0},
        },
    }
    if recipe.stages == 1:
        return {"type": StandardRoIHead, "bbox_head": boxes[0], **common}
    weights = list(recipe.stage_weights)
    return {
        "type": CascadeRoIHead,
        "num_stages": recipe.stages,
        "stage_loss_weights": weights,
        "bbox_head": boxes,
        **common,
    }


def _extractor(recipe: Recipe, patch_px: int, size: int) -> Config:
    """RoIs up to twice 56 px are read from the finest scale, with patches of 16."""
    return {
        "type": SingleRoIExtractor,
        # By torchvision's public operator and its own gradient, where mmcv's may not be compiled.
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0, "use_torchvision": True},
        "out_channels": recipe.channels,
        "featmap_strides": _strides(patch_px)[:-1],
        "finest_scale": 56 * patch_px / 16,
    }


def _box_head(recipe: Recipe, classes: int, stage: int) -> Config:
    (center, side), giou = _STDS[stage], recipe.box_loss == "giou"
    return {
        "type": ConvFCBBoxHead,
        "num_shared_convs": recipe.convs,
        "num_shared_fcs": 1,
        "in_channels": recipe.channels,
        "conv_out_channels": recipe.channels,
        "fc_out_channels": recipe.hidden,
        "roi_feat_size": 7,
        "num_classes": classes,
        "bbox_coder": {
            "type": DeltaXYWHBBoxCoder,
            "target_means": [0.0] * 4,
            "target_stds": [center, center, side, side],
        },
        "reg_class_agnostic": not recipe.class_boxes,
        "reg_decoded_bbox": giou,
        "norm_cfg": {"type": LayerNorm2d, "eps": 1e-6} if recipe.norm == "layer" else {"type": "SyncBN"},
        "loss_cls": {"type": CrossEntropyLoss, "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": GIoULoss, "loss_weight": 10.0} if giou else {"type": L1Loss, "loss_weight": 1.0},
    }


def _training(recipe: Recipe, stage: int) -> Config:
    """Which RoIs a stage learns from. mmdet's Mask R-CNN gives every object its best box, its cascade does not."""
    return {
        "assigner": _assigner(_IOU[stage], _IOU[stage], low_quality=recipe.stages == 1),
        "sampler": _sampler(recipe.rois, 0.25, add_objects=True),
        "mask_size": 28,
        "pos_weight": -1,
        "debug": False,
    }


def _assigner(positive: float, negative: float, *, low_quality: bool) -> Config:
    """Crowds are not objects, and boxes in them count as background (ignore_iof_thr -1), in all of the sources."""
    return {
        "type": MaxIoUAssigner,
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": negative,
        "match_low_quality": low_quality,
        "ignore_iof_thr": -1,
    }


def _sampler(count: int, positive: float, *, add_objects: bool) -> Config:
    return {
        "type": RandomSampler,
        "num": count,
        "pos_fraction": positive,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": add_objects,
    }
