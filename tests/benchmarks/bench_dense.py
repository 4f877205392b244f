"""Dense protocols: what our driver adds to mmengine's own Runner, and mmengine to plain torch; is val read ahead?

The frozen linear head on toy-ade20k, ViT-96x4x3: small, so that overhead shows.
"""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from typing import Any

import torch
from measure import alternate, report

from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.loading import Effort
from ssl_bench.evaluate.masks import open_masks
from ssl_bench.evaluate.subject import Subject
from ssl_bench.protocols.openmm import packages
from ssl_bench.protocols.semseg import RECIPES

packages.require()

from mmengine.dataset import InfiniteSampler, pseudo_collate  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from ssl_bench.protocols.openmm.network import parameter_groups  # noqa: E402
from ssl_bench.protocols.openmm.quiet import quiet  # noqa: E402
from ssl_bench.protocols.openmm.runner import Data, train, validate  # noqa: E402
from ssl_bench.protocols.openmm.segmentation import Segmentation  # noqa: E402

STEPS = 60


class Bench:
    """The same training three times."""

    def __init__(self) -> None:
        recipe = dataclasses.replace(RECIPES["linear-toy"], iterations=STEPS)
        masks = open_masks("toy-ade20k")
        subject = Subject(open_checkpoint("random:vit_96x4x3_patch8_48"), masks, Effort(workers=0))
        self.recipe, self.effort = recipe, subject.effort
        self.segmentation = Segmentation(subject, recipe, None, "bench")
        whole = self.segmentation.data()
        one = self.segmentation.masks.subset("val", [0])
        self.whole = whole
        self.data = Data(whole.train, type(whole.val)(one, "val", _steps(self.segmentation)), whole.metric)

    def parts(self) -> tuple[Any, torch.optim.Optimizer]:
        """A network, and its optimizer."""
        network = self.segmentation.network()
        groups = parameter_groups(network, lr=1e-3, weight_decay=self.recipe.weight_decay)
        return network, torch.optim.AdamW(groups, 1e-3)

    def loader(self) -> torch.utils.data.DataLoader[Any]:
        """As a config for the bare Runner asks for it: mmengine's sampler and collate."""
        sampler = InfiniteSampler(self.data.train, seed=0)  # type: ignore[arg-type]
        return torch.utils.data.DataLoader(
            self.data.train,  # type: ignore[arg-type]
            batch_size=self.recipe.batch,
            sampler=sampler,
            collate_fn=pseudo_collate,
        )

    def ours(self) -> None:
        """Through our driver."""
        network, optimizer = self.parts()
        course = dataclasses.replace(self.segmentation.course(1e-3), identity={"run": uuid.uuid4().hex})
        train(network, course, self.data, optimizer=optimizer, lr_factor=lambda step: 1.0, effort=self.effort)

    def bare(self) -> None:
        """mmengine's Runner as it comes, but silent."""
        network, optimizer = self.parts()
        with tempfile.TemporaryDirectory() as folder, quiet():
            runner = Runner(
                network,
                folder,
                train_dataloader=self.loader(),
                train_cfg={"type": "IterBasedTrainLoop", "max_iters": STEPS},
                optim_wrapper={"type": "OptimWrapper", "optimizer": optimizer},
                default_hooks={"checkpoint": None},
                default_scope="mmseg",
                experiment_name=uuid.uuid4().hex,
            )
            runner.train()

    def plain(self) -> None:
        """The same network and optimizer, stepped by hand."""
        network, optimizer = self.parts()
        batches = iter(self.loader())
        network.train()
        for _ in range(STEPS):
            batch = network.data_preprocessor(next(batches), True)
            losses = network(**batch, mode="loss")
            loss = sum(value for name, value in losses.items() if "loss" in name)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def score(self, ahead: bool) -> None:
        """All val images; else each is read when the network waits for it."""
        network, _ = self.parts()
        data = self.whole
        if ahead:
            validate(network, data, self.effort)
            return
        network.eval()
        results = []
        with torch.no_grad():
            for index in range(len(data.val)):
                batch = pseudo_collate([data.val[index]])
                results += [data.metric.read(sample.to_dict()) for sample in network.val_step(batch)]
        data.metric.scores(results)


def _steps(segmentation: Segmentation) -> list[dict[str, Any]]:
    from ssl_bench.protocols.openmm.scenes import scoring

    return scoring(segmentation.recipe, segmentation.masks.scale_px)


def main() -> None:
    bench = Bench()
    times = alternate({"ours": bench.ours, "bare": bench.bare, "plain": bench.plain}, repeats=5)
    val = alternate({"ahead": lambda: bench.score(True), "waiting": lambda: bench.score(False)})
    report(
        f"dense: frozen linear head on toy-ade20k, {STEPS} steps of {bench.recipe.batch}, {times['ours']:.1f} s",
        [
            ("our driver / mmengine's bare Runner", f"{times['ours'] / times['bare']:.3f}", "at most 1.03"),
            ("our driver / the same network stepped in plain torch", f"{times['ours'] / times['plain']:.3f}", "1.2"),
            ("val, read ahead / read when needed", f"{val['ahead'] / val['waiting']:.2f}", "below 1"),
        ],
    )


if __name__ == "__main__":
    main()
