"""The gate of this repository: leaderboards/baselines/toy.json holds what `ssl-bench demo` scores.

Here MOCA is trained anew, half as long as in the demo (a minute and a half on one thread), scored by k-NN and low-shot
classification, and held against toy-short.json; the network that was never trained is held against toy.json itself.
Then the same with a copy of the trained one that was damaged as a wrong loader would.

Why half: all of it takes twice as long, and a quarter gates nothing. k-NN after 2 epochs 17.3 %, after 3 19.4, after 6
38.5, after the demo's 12 48.3; 13.3 of a network that was never trained. The same after 6 epochs in fp32 37.5, other
seeds 41.0 and 33.8; matrices of attention transposed 23.7, patch embedding shuffled 22.8, positions shuffled 27.4, one
block shuffled 28.3 (the first) or 37.5 (the second, which three blocks hardly miss, and no gate on accuracy can see).
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from test_run import cli

from ssl_bench import demo
from ssl_bench.evaluate.checkpoints import open_checkpoint
from ssl_bench.evaluate.saving import save
from ssl_bench.leaderboards.baseline import read_baseline, recipe_sha256, write_baseline
from ssl_bench.protocols.catalog import PROTOCOLS

FOLDER = Path(__file__).parent.parent / "leaderboards" / "baselines"
TOY, SHORT = FOLDER / "toy.json", FOLDER / "toy-short.json"
SCORED = "knn/moca-paper,lowshot/moca"
RANDOM, MOCA = f"random-{demo.ARCHITECTURE}", "moca-toy-6-epochs"


@pytest.mark.parametrize("path", [TOY, SHORT], ids=lambda path: path.name)
def test_the_baselines_are_of_the_code_as_it_is(path):
    baseline = read_baseline(path)
    for entry in baseline.entries:
        module = PROTOCOLS[entry.protocol]
        assert entry.version == module.VERSION, f"{entry.name}: score it again, then `ssl-bench check --update`"
        recipe = SimpleNamespace(resolved_recipe=asdict(module.RECIPES[entry.recipe]), overrides={})
        assert entry.recipe_sha256 == recipe_sha256(recipe), (
            f"{entry.name}: its recipe has changed, its version has not"
        )
        assert entry.deviations == {}
        assert entry.ckpt in (None, "pixels:", f"random:{demo.ARCHITECTURE}")  # no path of a machine
        assert (entry.samples is not None) == (entry.protocol in ("knn", "linear"))
    assert baseline.about


def test_toy_holds_the_chain_of_the_demo():
    classified, dense = demo.PROTOCOLS.split(","), demo.DENSE.split(",")
    chain = {("pixels", "knn"), ("moca-toy", "detection")}
    chain |= {(model, name.partition("/")[0]) for model in (RANDOM, "moca-toy") for name in (*classified, *dense)}
    entries = [(entry.model, entry.protocol) for entry in read_baseline(TOY).entries]
    assert sorted(entries) == sorted(chain)


def _run(*arguments: str | Path) -> None:
    done = cli(*arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})  # beside other tests, a second thread only waits
    assert done.returncode == 0, done.stderr[-2000:]


def _check(baseline: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return cli("check", "--baseline", baseline, *arguments)


def _damaged(checkpoint: Path, out: Path) -> None:
    """The square matrices of attention transposed: every shape fits, and every norm."""
    document = torch.load(checkpoint, weights_only=True)
    for state in document["networks"].values():
        for name, weight in state.items():
            if name.endswith(("attn.qkv.weight", "attn.proj.weight")):
                squares = weight.split(weight.shape[1])
                state[name] = torch.cat([square.T for square in squares])
    save(document, out)


def test_the_toy_chain_passes_and_a_damaged_checkpoint_does_not(tmp_path):
    """Folders are this test's own, but for the cache, which a test process keeps to itself."""
    toy, short = read_baseline(TOY), read_baseline(SHORT)
    random = [entry for entry in toy.entries if entry.model == RANDOM and entry.protocol in ("knn", "lowshot")]
    baseline = tmp_path / "part.json"
    write_baseline(replace(short, entries=[*random, *short.entries]), baseline)
    trained, damaged = tmp_path / "moca" / "checkpoint.pt", tmp_path / "damaged.pt"

    _run("run", "--ckpt", f"random:{demo.ARCHITECTURE}", "--protocol", SCORED, "--dataset", "toy")
    before = _check(baseline)
    assert before.returncode == 1
    assert before.stdout.splitlines()[-1] == "failed: 2 missing, 2 passed"

    _run("pretrain", "moca", "--data", "toy", "--set", "epochs=6", "--out", trained.parent)
    _run("run", "--ckpt", trained, "--name", MOCA, "--protocol", SCORED, "--dataset", "toy")
    passed = _check(baseline)
    assert passed.returncode == 0, passed.stdout

    _damaged(trained, damaged)
    assert open_checkpoint(str(damaged)).match.matched_percent == 100  # the loader sees nothing wrong
    _run("run", "--ckpt", damaged, "--name", MOCA, "--protocol", SCORED, "--dataset", "toy")
    failed = _check(baseline, "--junit", tmp_path / "junit.xml")
    assert failed.returncode == 1, failed.stdout
    told = [line for line in failed.stdout.splitlines() if line.startswith("dropped: ")]
    assert any(line.startswith(f"dropped: {MOCA} · toy · knn/moca-paper@v1 · top1: ") for line in told)
    assert all(f" {MOCA} · " in line and "2 records fit; the newest was taken" in line for line in told)
    cases = ElementTree.parse(tmp_path / "junit.xml").getroot().findall("testsuite/testcase")
    assert {case.get("name").split(" · ")[0] for case in cases if case.find("failure") is not None} == {MOCA}
