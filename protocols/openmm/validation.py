"""Scoring val in mmengine's Runner: every image once, shared by the processes, scored by the first of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.runner import Runner, ValLoop
from torch import nn

from ssl_bench.errors import UserError
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.training import distributed
from ssl_bench.progress import Advance
from ssl_bench.protocols.openmm.loading import checked, val_batches

if TYPE_CHECKING:
    from ssl_bench.protocols.openmm.runner import Data, Metric


class Validation(ValLoop):
    """mm's, over batches that may turn out to be errors. `broken` is filled with the images that are skipped."""

    def __init__(
        self, runner: Runner, data: Data, effort: Effort, *, broken: list[int], advance: Advance = lambda count: None
    ) -> None:
        super().__init__(runner, val_batches(data.val, effort), Evaluator([_Gathered(data.metric, broken)]))
        self.broken, self.advance = broken, advance

    def run(self) -> dict[str, Any]:
        """All val images once."""
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        share_buffers(self.runner.model)
        self.broken.clear()
        error = None
        try:
            with contextlib.closing(checked(self.dataloader, self.broken)) as batches:
                for index, batch in enumerate(batches):
                    self.run_iter(index, batch)
                    self.advance(self.runner.world_size)
        except UserError as wrong:
            error = wrong
        distributed.refuse_together(error)
        metrics: dict[str, Any] = self.evaluator.evaluate(len(self.dataloader.dataset))
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics


def share_buffers(network: nn.Module) -> None:
    """Where BatchNorm is not synchronized (several processes on CPUs), all score with the mean of their statistics."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            distributed.mean_of_all(buffer)


class _Gathered(BaseMetric):
    """What our metric read of every image, brought together from all processes."""

    def __init__(self, metric: Metric, broken: list[int]) -> None:
        super().__init__(prefix="ssl-bench")
        self.metric, self.broken = metric, broken

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Each with its place in the dataset."""
        self.results += [(int(sample["index"]), self.metric.read(sample)) for sample in data_samples]

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Of sorted results."""
        return {"outcome": self.metric.scores(results)}

    def evaluate(self, size: int) -> dict[str, Any]:
        """Nothing is padded, so every image counts once."""
        everywhere = dict(distributed.gathered_objects(self.results))
        self.broken[:] = sorted(distributed.union(self.broken))
        self.results.clear()
        assert len(everywhere) + len(self.broken) == size, "a val image was counted twice or lost"
        metrics: list[dict[str, Any]] = []
        distributed.on_first(
            lambda: metrics.append(self.compute_metrics([everywhere[index] for index in sorted(everywhere)]))
        )
        return cast(dict[str, Any], distributed.gathered_objects(metrics)[0])
