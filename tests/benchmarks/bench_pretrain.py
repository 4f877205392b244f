"""Pre-training: a step against its bare forward and backward passes, and what masking saves.

    python tests/benchmarks/bench_pretrain.py

The bare passes replay every layer that a step calls outside the losses (patch projection, transformer blocks, heads),
on inputs of the shapes that the step gave it, forward and, where the step had a gradient, backward: no targets, no
losses, no optimizer, no teacher's average. The same networks at the same token counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from measure import alternate, report
from timm.layers import PatchEmbed
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.pretrain.catalog import METHODS
from ssl_bench.pretrain.loop import Run, Settings
from ssl_bench.pretrain.measure import NOWHERE, prepare, step

WHOLE = (Block, LayerScaleBlockClassAttn, nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
SMALL = "vit_small_patch16_224"
# Large enough that the optimizer, which does not care for the batch, weighs no more than in a real run: MAE sees a
# quarter of the tokens of a batch of thousands, MMC's twelve whole views are as many tokens as 40 images of the others.
BATCH = {"mmc": 4, "mae": 64}
REPEATS = 2
Call = tuple[nn.Module, list[tuple[int, ...]], bool]


def main() -> None:
    """Measure and print."""
    dtype = "bf16"
    rows = []
    for method in METHODS:
        run, views = small(method, dtype)
        calls = recorded(run, views)
        times = alternate({"step": lambda: step(run, views), "bare": lambda: replay(run, calls)}, REPEATS)  # noqa: B023
        rows.append((f"{method}: step / bare forward and backward", f"{times['step'] / times['bare']:.2f}", "<= 1.15"))
    report(f"A training step of ViT-S/16 at 224 px, {dtype}", rows)
    report("MOCA: partial against full decoding (Table 1)", [_decoding(depth, dtype) for depth in (2, 4, 8)])
    report("ExtreMA: masks", [_masks(dtype)])


def small(method: str, dtype: str, **changes: Any) -> tuple[Run, Views]:
    """The paper's row at ViT-S/16, in a batch that fits this machine."""
    row = next(iter(METHODS[method].RECIPES.values()))
    recipe = dataclasses.replace(row, arch=SMALL, batch=BATCH.get(method, 16), **changes)
    base = open_checkpoint(f"random:{SMALL}") if method == "tec" else None
    return prepare(method, recipe, Settings(out=NOWHERE, dtype=dtype), base=base)  # type: ignore[arg-type]


def recorded(run: Run, views: Views) -> list[Call]:
    """Every call of a whole layer in one step, with the shapes that went in."""
    calls: list[Call] = []
    inside = 0

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal inside
        if inside == 0:
            shapes = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
            calls.append(
                (module, shapes, torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
            )
        inside += 1

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal inside
        inside -= 1

    handles = [
        handle
        for module in run.method.modules()
        if isinstance(module, WHOLE) and not isinstance(module, PatchEmbed)
        for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    step(run, views)
    for handle in handles:
        handle.remove()
    return calls


def replay(run: Run, calls: list[Call]) -> None:
    """The calls again, each by itself."""
    for module, shapes, trained in calls:
        inputs = [torch.randn(shape, requires_grad=trained) for shape in shapes]
        with torch.set_grad_enabled(trained), torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(*inputs)
        if trained:
            output.backward(torch.ones_like(output))
    run.optimizer.zero_grad(set_to_none=True)


def _decoding(depth: int, dtype: str) -> tuple[str, str, str]:
    runs = {}
    for name, partial in (("partial", True), ("full", False)):
        # The paper's setting: one round, 65 % masked, 20 % decoded or all.
        ratios: dict[str, Any] = {"mask_ratios": (0.65,), "decoded_ratio": 0.2 if partial else None}
        run, views = small("moca", dtype, decoder_depth=depth, **ratios)
        runs[name] = _stepping(run, views)
    times = alternate(runs, REPEATS)
    return f"depth {depth}: partial / full", f"{times['partial'] / times['full']:.2f}", "< 1"


def _masks(dtype: str) -> tuple[str, str, str]:
    runs = {str(masks): _stepping(*small("extrema", dtype, num_masks=masks)) for masks in (1, 2)}
    times = alternate(runs, REPEATS)
    return "a step with two masks / two steps with one", f"{times['2'] / (2 * times['1']):.2f}", "< 1"


def _stepping(run: Run, views: Views) -> Callable[[], None]:
    return lambda: step(run, views)


if __name__ == "__main__":
    main()
