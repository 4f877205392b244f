"""torchvision in place of mmcv's compiled operators, so that nothing has to be compiled.

A compiled mmcv holds them in its module `mmcv._ext`; as it comes from PyPI, it has no such module. `install()` puts a
finder at the end of sys.meta_path. So one that is compiled is found first and used; otherwise `import mmcv._ext` gives
nms, soft-nms and RoIAlign with the signatures of mmcv's kernels, which is all that Mask R-CNN and its kin call (mmseg
calls none). Every other operator can be imported, and says when it is called that it is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import reduce
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ssl_bench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "mmcv._ext"
# The first module that goes without operators for good when the import of mmcv._ext fails.
_TOO_LATE = "mmdet.structures.mask.structures"


def _promoted(*tensors: Tensor) -> list[Tensor]:
    """All in float32, or in float64 if one is: as mmcv's kernels compute, and torchvision wants one dtype."""
    import torch

    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that are kept, best first; with offset 1 a box is x2 - x1 + 1 wide."""
    import torch

    boxes, scores = _promoted(boxes, scores)
    boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    kept: Tensor = torch.ops.torchvision.nms(boxes, scores, iou_threshold)
    return kept


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al. 2017): a box lowers the scores of those that it overlaps, instead of removing them.

    Methods 0, 1 and 2 are hard, linear (their Eq. 3) and Gaussian (below it). Writes the kept boxes with their lowered
    scores to the first rows of `dets` (N, 5), and gives their indices.
    """
    import torch

    boxes, scores = _promoted(boxes, scores)
    scores = scores.clone()
    sizes = boxes[:, 2:] - boxes[:, :2] + offset
    areas = sizes[:, 0] * sizes[:, 1]
    left = torch.arange(len(boxes), device=boxes.device)
    kept: list[int] = []
    while len(left):
        best = int(left[scores[left].argmax()])
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = left[left != best]
        corners = torch.minimum(boxes[best, 2:], boxes[left, 2:]), torch.maximum(boxes[best, :2], boxes[left, :2])
        common = (corners[0] - corners[1] + offset).clamp(min=0).prod(1)
        iou = common / (areas[best] + areas[left] - common)
        if method == 2:
            scores[left] *= torch.exp(-(iou**2) / sigma)
        else:
            scores[left] *= torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1)
        left = left[scores[left] >= min_score]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise _unserved("roi_align with pool_mode='max'")


def roi_align_forward(  # noqa: PLR0913 -- mmcv's signature
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average of the maps (B, C, H, W) in the cells of every RoI (N, 5: image, x1, y1, x2, y2), into `output`."""
    import torch

    _require_average(pool_mode)
    maps, rois = _promoted(input, rois)
    size = aligned_height, aligned_width
    output.copy_(torch.ops.torchvision.roi_align(maps, rois, spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(  # noqa: PLR0913 -- mmcv's signature
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of `roi_align_forward` with respect to the maps, into `grad_input`."""
    import torch

    _require_average(pool_mode)
    grad, rois = _promoted(grad_output, rois)
    size = aligned_height, aligned_width
    backward = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(backward(grad, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned))


OPERATORS: Sequence[Callable[..., Any]] = (nms, softnms, roi_align_forward, roi_align_backward)


def _unserved(name: str) -> UserError:
    served = ", ".join(operator.__name__ for operator in OPERATORS)
    return UserError(
        f"mmcv's compiled operator {name} was called. The installed mmcv holds no compiled operators, and torchvision "
        f"stands in for {served} only. Choose a model that does not need it, or install an mmcv that was compiled with "
        "its operators: it is then used by itself."
    )


def _absent(name: str) -> Callable[..., Any]:
    """The module's __getattr__: mmcv wants to find every operator when it is imported."""
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        raise _unserved(name)

    return call


class _Finder(MetaPathFinder, Loader):
    """A finder, since mmengine asks for the module's spec: a bare module in sys.modules has none."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == NAME else None

    def exec_module(self, module: ModuleType) -> None:
        import torchvision  # noqa: F401 -- registers torch.ops.torchvision

        vars(module).update({operator.__name__: operator for operator in OPERATORS}, __getattr__=_absent)


def install() -> None:
    """Before mmseg and mmdet are imported; once is enough."""
    check_order()
    if not _installed():
        sys.meta_path.append(_Finder())


def check_order() -> None:
    """Refuse when it is too late to install."""
    if _TOO_LATE in sys.modules and NAME not in sys.modules and not _installed():
        raise UserError(
            "mmdet (or mmseg, which imports it) was imported before ssl-bench could stand in for mmcv's compiled "
            "operators, and does without them until the process ends. Expected another order: start anew, and call "
            "ssl_bench.protocols.openmm.packages.require() before mmseg and mmdet are imported."
        )


def _installed() -> bool:
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def compiled() -> bool:
    """Whether the installed mmcv has operators of its own; does not import it."""
    mmcv = find_spec("mmcv")
    return mmcv is not None and PathFinder.find_spec(NAME, mmcv.submodule_search_locations) is not None
