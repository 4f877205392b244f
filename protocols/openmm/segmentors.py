"""The segmentation networks of semseg.py as mmseg's configs: the network under test, a head, and how images are tiled.

Where the heads are mmseg's own (UPerNet with its auxiliary FCN, Segmenter's mask transformer), they stay as they are.
Ours are the linear one, since mmseg's FCNHead makes a convolution of the whole width even where it uses none; the loss;
and the end of the prediction, which mmseg computes for all classes at full size at once (ImageNet-S: 30 GB an image).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor, SegmenterMaskTransformerHead, UPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from ssl_bench.evaluate.architecture import Architecture
from ssl_bench.evaluate.masks import IGNORE
from ssl_bench.evaluate.training import distributed
from ssl_bench.protocols.openmm.network import Network, layers_of
from ssl_bench.protocols.openmm.pyramids import LayerNorm2d, UpDown

if TYPE_CHECKING:
    from ssl_bench.protocols.semseg import Recipe

Config = dict[str, Any]

_SYNC_BN = {"type": "SyncBN", "requires_grad": True}
_AUXILIARY_CHANNELS = 256
_HAIR = 1e-9  # against rounding
_AT_ONCE = 2**26  # numbers of an enlarged map that are held at a time


def segmentor(recipe: Recipe, architecture: Architecture, classes: int) -> Config:
    """The config of the whole network."""
    patch, crop, layers = architecture.patch_px, recipe.crop_px, layers_of(recipe.layers, architecture.depth)
    tiles = {"mode": "slide", "crop_size": (crop, crop), "stride": (recipe.stride_px, recipe.stride_px)}
    return {
        "type": Segmentor,
        "data_preprocessor": {
            "type": SegDataPreProcessor,
            "mean": [255 * value for value in architecture.mean],
            "std": [255 * value for value in architecture.std],
            "bgr_to_rgb": True,
            "size": (crop, crop),
            "seg_pad_val": IGNORE,
            "test_cfg": {"size_divisor": patch},  # what is padded is cut off again
        },
        "backbone": {
            "type": Network,
            "architecture": architecture,
            "layers": layers,
            "norm": recipe.norm,
            "frozen": recipe.frozen,
            "drop_path": 0.0 if recipe.frozen else recipe.drop_path,
        },
        **_HEADS[recipe.head](architecture, len(layers), classes),
        "train_cfg": {},
        "test_cfg": {"mode": "whole"} if recipe.stride_px is None else tiles,
    }


def _shared(classes: int, dropout: float, weight: float = 1.0) -> Config:
    """What all heads are told. out_channels: two classes are two outputs too, not one with a threshold."""
    return {
        "num_classes": classes,
        "out_channels": classes,
        "ignore_index": IGNORE,
        "align_corners": False,
        "dropout_ratio": dropout,
        "loss_decode": {"type": PixelCrossEntropy, "loss_weight": weight},
    }


def _linear(
    norm: Literal["none", "batch", "layer"], std: float, architecture: Architecture, maps: int, n: int
) -> Config:
    return {
        "decode_head": {
            "type": LinearHead,
            "in_channels": [architecture.dim] * maps,
            "in_index": list(range(maps)),
            "input_transform": "resize_concat",
            "channels": architecture.dim * maps,
            "norm": norm,
            "eps": architecture.eps,
            "std": std,
            **_shared(n, 0.0),
        }
    }


def _upernet(architecture: Architecture, maps: int, classes: int) -> Config:
    """UPerNet as in BEiT's, iBOT's, CAE's and mmseg's own configs: as wide as the network (768 there)."""
    assert maps == 4
    dim = architecture.dim
    return {
        "neck": {"type": UpDown, "dim": dim, "norm": "SyncBN"},
        "decode_head": {
            "type": UPerHead,
            "in_channels": [dim] * 4,
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": dim,
            "norm_cfg": _SYNC_BN,
            **_shared(classes, 0.1),
        },
        "auxiliary_head": {
            "type": FCNHead,
            "in_channels": dim,
            "in_index": 2,
            "channels": min(_AUXILIARY_CHANNELS, dim),
            "num_convs": 1,
            "concat_input": False,
            "norm_cfg": _SYNC_BN,
            **_shared(classes, 0.1, weight=0.4),
        },
    }


def _mask_transformer(architecture: Architecture, maps: int, classes: int) -> Config:
    """Segmenter's decoder with one layer; its dropout is .1, in attention too."""
    assert maps == 1
    return {
        "decode_head": {
            "type": SegmenterMaskTransformerHead,
            "in_channels": architecture.dim,
            "in_index": 0,
            "channels": architecture.dim,
            "embed_dims": architecture.dim,
            "num_heads": architecture.heads,
            "num_layers": 1,
            "drop_rate": 0.1,
            "attn_drop_rate": 0.1,
            "drop_path_rate": 0.0,
            **_shared(classes, 0.0),
        }
    }


_HEADS = {
    # std of the first weights: mmseg's; ImageNet-S, as MAE, has next to nothing. (Segmenter's .02 is not followed.)
    "linear": lambda *given: _linear("none", 0.01, *given),
    "batchnorm+linear": lambda *given: _linear("batch", 0.01, *given),
    **dict.fromkeys(("layernorm+linear", "fc_norm+linear"), lambda *given: _linear("layer", 2e-5, *given)),
    "upernet": _upernet,
    "mask": _mask_transformer,
}


class Segmentor(EncoderDecoder):
    """mmseg's, with predictions that fit into memory."""

    def whole_inference(self, inputs: Tensor, batch_img_metas: Sequence[Any]) -> Tensor:
        """The map's logits as they are, which are enlarged once, at the end (mmseg: to the image first)."""
        logits: Tensor = self.decode_head(self.extract_feat(inputs))
        return logits

    def postprocess_result(self, seg_logits: Tensor, data_samples: Sequence[Any]) -> Sequence[Any]:
        """The class of every pixel of the image as it is stored; what was padded goes."""
        height, width = seg_logits.shape[-2:]
        for logits, sample in zip(seg_logits, data_samples, strict=True):
            _, right, _, bottom = sample.metainfo["img_padding_size"]  # nothing left and above
            padded_height, padded_width = sample.metainfo["pad_shape"]
            cells = height * (1 - bottom / padded_height), width * (1 - right / padded_width)
            labels = enlarged_argmax(logits, sample.metainfo["ori_shape"], cells)
            sample.set_data({"pred_sem_seg": PixelData(data=labels[None])})
        return data_samples


def enlarged_argmax(logits: Tensor, size: tuple[int, int], cells: tuple[float, float]) -> Tensor:
    """argmax over classes of (classes, h, w) after bilinear interpolation, a few classes at a time.

    The upper left `cells` of the map (height, width; at its border a cell may be covered in part) become `size`.
    """
    step = max(1, _AT_ONCE // (size[0] * size[1]))
    best, label = torch.full(size, -torch.inf, device=logits.device), torch.zeros(size, dtype=torch.int64)
    label = label.to(logits.device)
    scale = [side * (1 + _HAIR) / count for side, count in zip(size, cells, strict=True)]
    inner = logits[None, :, : math.ceil(cells[0] - _HAIR), : math.ceil(cells[1] - _HAIR)]
    for first in range(0, len(logits), step):
        part = inner[:, first : first + step].float()
        # torch computes the size from the scale too, and rounds down; it may be larger by a cell in part.
        larger = F.interpolate(part, scale_factor=scale, mode="bilinear", align_corners=False)[0]
        values, classes = larger[:, : size[0], : size[1]].max(dim=0)
        better = values > best
        best, label = torch.where(better, values, best), torch.where(better, classes + first, label)
    return label


class PixelCrossEntropy(nn.Module):
    """Cross entropy, averaged over the labeled pixels of what is computed at a time, in all processes together.

    mmseg's with avg_non_ignore=True averages in each process; where one has more labeled pixels than another, their
    mean is not that of the batch, and the number of processes would change a training. The parts into which
    --batch-size cuts a batch do change it: each has its own mean, and they weigh alike.

    Where one process's loss is not finite, no one's is: all stop at the same step.
    """

    loss_name = "loss_ce"

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, labels: Tensor, weight: None = None, ignore_index: int = IGNORE) -> Tensor:
        """(B, classes, H, W), (B, H, W) -> its share of the loss, for gradients that are averaged over processes."""
        assert weight is None
        total = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
        shared = torch.stack([(labels != ignore_index).sum().float(), total.detach()])
        labeled, mean = distributed.mean_of_all(shared)
        loss: Tensor = self.loss_weight * total / labeled.clamp(min=1e-6) + 0 * mean
        return loss


class LinearHead(BaseDecodeHead):
    """A 1 x 1 convolution on the maps, joined at the size of the first; before it BatchNorm, LayerNorm or nothing.

    With LayerNorm it is that of ImageNet-S (LUSSeg/ImageNetSegModel), whose loss is computed at twice the size of the
    map, with the nearest labels.
    """

    def __init__(self, *, norm: Literal["none", "batch", "layer"], eps: float, std: float, **shared: Any) -> None:
        super().__init__(init_cfg=None, **shared)
        norms: Mapping[str, nn.Module] = {
            "none": nn.Identity(),
            "batch": nn.SyncBatchNorm(self.channels),
            "layer": LayerNorm2d(self.channels, eps),
        }
        self.norm, self.std, self.coarse = norms[norm], std, norm == "layer"

    def init_weights(self) -> None:
        """Normal weights; the norm is as torch makes it."""
        nn.init.trunc_normal_(self.conv_seg.weight, std=self.std)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits, at the maps' size."""
        logits: Tensor = self.cls_seg(self.norm(self._transform_inputs(inputs)))
        return logits

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """As mmseg's, without the accuracy, which costs as much and goes nowhere."""
        labels = self._stack_batch_gt(batch_data_samples)  # (B, 1, H, W)
        size = labels.shape[-2:]
        if self.coarse:
            size = torch.Size(2 * side for side in seg_logits.shape[-2:])
            labels = F.interpolate(labels.float(), size, mode="nearest").long()  # exact: floats hold all labels
        logits = F.interpolate(seg_logits, size, mode="bilinear", align_corners=False)
        return {"loss_ce": self.loss_decode(logits, labels[:, 0], ignore_index=self.ignore_index)}
