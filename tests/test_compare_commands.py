"""`ssl-bench compare` and `ssl-bench sensitivity` as people call them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_architecture, tiny_backbone
from test_paired import RIGHT_A, RIGHT_B, A, B, scored, seeded, store

import ssl_bench
from ssl_bench import running
from ssl_bench import sensitivity as module
from ssl_bench.cli_compare import conclusion
from ssl_bench.errors import UserError
from ssl_bench.evaluate import features
from ssl_bench.evaluate.backbone import build
from ssl_bench.evaluate.saving import save_checkpoint
from ssl_bench.leaderboards import agreement, paired
from ssl_bench.leaderboards.store import load_results, load_samples
from ssl_bench.protocols import knn


@pytest.fixture
def call(monkeypatch, capsys):
    """Exit code, stdout and stderr of a command, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from ssl_bench import cli

        monkeypatch.setattr(sys, "argv", ["ssl-bench", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def root(tmp_path):
    return tmp_path / "results"  # SSL_BENCH_RESULTS of every test


# compare ------------------------------------------------------------------------------------------------------------


def test_compare_prints_one_document(call, root):
    path_a, path_b = store(root, "a", RIGHT_A), store(root, "b", RIGHT_B)
    code, out, err = call("compare", A, B, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["compare"]
    assert (found["a"]["value"], found["b"]["value"], found["difference"]) == (42, 33, 9)
    assert found["p"] == pytest.approx(paired.mcnemar(12, 3))
    assert found["pairs"]["only_a"] == 12
    assert found["pairs"]["odds_ratio"] == 4
    assert len(found["interval95"]) == len(found["pairs"]["bootstrap_interval95"]) == 2
    assert (found["better"], found["metric"], found["protocol"], found["version"]) == ("a", "top1", "knn", 1)
    assert found["a"]["records"] == [str(path_a)]
    assert found["b"]["records"] == [str(path_b)]
    assert found["conclusion"].startswith(f"{A} is better than {B}: A - B = +9.00 (95 % interval ")


def test_compare_prints_what_people_read(call, root):
    store(root, "a", RIGHT_A), store(root, "b", RIGHT_B)
    code, out, _ = call("compare", A, B)
    assert code == 0
    for text in (
        f"{A}: 42.00",
        f"{B}: 33.00",
        "top1, knn/dino@v1 on toy",
        "A - B",
        "+9.00, 95 % interval",
        "30 both right, 12 only A, 3 only B, 55 neither",
        "4.00, 95 % interval 1.08 to 22.09",
        "p = 0.035 (McNemar's exact test)",
        f"{A} is better than {B}: A - B = +9.00",
    ):
        assert text in out


def test_compare_over_seeds_prints_both_questions(call, root):
    seeded(root, "a", [0.90, 0.52]), seeded(root, "b", [0.50, 0.50])
    _, out, _ = call("compare", A, B)
    assert "(mean of seeds 0, 1)" in out
    assert "over 2 seeds" in out
    assert "(image, seed) pairs" in out
    assert "It would hold on other images, but perhaps not on other seeds." in out
    assert json.loads(call("compare", A, B, "--json")[1])["compare"]["over_seeds"]["df"] == 1


def test_compare_without_images_says_so(call, root):
    scored(root, "a", 45.0, 0.6), scored(root, "b", 44.0, 0.7)
    _, out, _ = call("compare", A, B)
    assert "an unpaired test from the two standard errors, which sees less" in out
    assert "No significant difference: A - B = +1.00" in out
    assert json.loads(call("compare", A, B, "--json")[1])["compare"]["pairs"] is None


def test_a_comparison_without_bounds_is_still_a_document(call, root):
    store(root, "a", [1] * 20 + [0] * 20), store(root, "b", [0] * 40)
    found = json.loads(call("compare", A, B, "--json")[1])["compare"]
    assert found["pairs"]["odds_ratio"] is None
    assert found["pairs"]["odds_ratio_interval95"][1] is None
    assert "-, 95 % interval" in call("compare", A, B)[1]


def test_compare_refuses_by_exit_code_2(call, root):
    store(root, "a", RIGHT_A), store(root, "b", RIGHT_B, recipe="ibot")
    code, out, err = call("compare", A, "b/toy/knn/ibot")
    assert (code, out) == (2, "")
    assert "--allow recipe" in err
    assert call("compare", A, "b/toy/knn/ibot", "--allow", "recipe")[0] == 0
    assert call("compare", A, "c/toy/knn/dino")[0] == 2


def test_tiny_p_is_never_zero(root):
    store(root, "a", [1] * 90 + [0] * 10), store(root, "b", [0] * 100)
    assert "p < 1e-8" in conclusion(ssl_bench.compare(A, B, root=root))


def test_a_test_and_an_interval_that_disagree_are_explained(root):
    store(root, "a", [1] * 6 + [0] * 14), store(root, "b", [0] * 5 + [1] + [0] * 14)
    outcome = ssl_bench.compare(A, B, root=root)
    assert outcome.p == 2 / 2**5 > 0.05
    assert outcome.interval95[0] > 0
    assert "the test is what counts here" in conclusion(outcome)
    store(root, "a", [1] * 30 + [0] * 70), store(root, "b", [0] * 100)
    assert "the test is what counts" not in conclusion(ssl_bench.compare(A, B, root=root))


def test_a_terminal_without_unicode_and_files_that_cannot_be_read(root):
    store(root, "a·b\nc", RIGHT_A), store(root, "b", RIGHT_B)
    torn = store(root, "torn", RIGHT_A)
    torn.write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "ssl_bench.cli", "compare", "a·b\nc/toy/knn/dino", B],
        env=os.environ | {"SSL_BENCH_RESULTS": str(root), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"a?b" in done.stdout
    assert f"left out: {torn}".encode() in done.stderr


# sensitivity --------------------------------------------------------------------------------------------------------


def test_outcomes_on_other_images_are_refused(root):
    store(root, "a", RIGHT_A), store(root, "b", RIGHT_B[:-1]), store(root, "c", RIGHT_B, order=range(99, -1, -1))
    records = {record.model: record for record in load_results(root)}
    found = module._correct({name: records[name] for name in "ac"}, root)
    assert (list(found["a"]), list(found["c"])) == (list(map(bool, RIGHT_A)), list(map(bool, RIGHT_B)))
    with pytest.raises(UserError, match="b: the kept outcomes of knn/dino are of other images than those of a"):
        module._correct({name: records[name] for name in "ab"}, root)


def test_every_recipe_is_a_variant_or_the_same_as_one():
    variants, same = module.variants()
    names = [variant.name for variant in variants]
    assert {f"knn/{name}" for name in knn.RECIPES} <= set(names) | set(same)
    assert same == {"knn/ibot": "knn/dino"}
    assert len(set(names)) == len(names) == len(knn.RECIPES) - 1 + len(module.BASES) * len(module.CHANGES)
    for variant in variants:
        recipe, base = variant.resolved(), knn.RECIPES[variant.recipe]
        changed = {f.name for f in dataclasses.fields(recipe) if getattr(recipe, f.name) != getattr(base, f.name)}
        assert changed == set(variant.settings)


def test_recipes_are_the_same_only_if_they_report_the_same():
    dino = knn.RECIPES["dino"]
    same = dataclasses.replace(dino, neighbors=(20,), source="", published="x")
    assert module._reported(dino) == module._reported(same)
    for change in ({"neighbors": (10, 20)}, {"norm": False}, {"bank_percent": 50.0}, {"reported": "best"}):
        assert module._reported(dino) != module._reported(dataclasses.replace(dino, **change))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A network with a class token, one without, and how the command names the raw pixels."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder / "with.pt", tiny_backbone())
    without = build(dataclasses.replace(tiny_architecture(), cls=False)).eval()
    save_checkpoint(folder / "without.pt", without)
    return [str(folder / "with.pt"), str(folder / "without.pt"), "pixels:"]


def flags(checkpoints: list[str]) -> list[str]:
    return [text for ckpt in checkpoints for text in ("--ckpt", ckpt)]


def test_sensitivity_end_to_end(call, root, checkpoints, own_cache, monkeypatch):
    passes = []
    load = features.load
    monkeypatch.setattr(features, "load", lambda split, *rest: passes.append(split.name) or load(split, *rest))
    arguments = ["sensitivity", *flags(checkpoints), "-d", "digits", "--limit", 250]
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out)["sensitivity"]
    assert sorted(passes) == ["train"] * 3 + ["val"] * 3  # one pass a checkpoint and split serves all variants

    results = load_results(root)
    scores = found["scores"]
    assert len(results) == sum(len(of) for of in scores.values())
    by_name = {(r.model, r.recipe, tuple(r.overrides)): r for r in results}
    assert scores["knn/mmc-patch"]["with"]["value"] == by_name["with", "mmc-patch", ()].main_score.value
    assert scores["knn/dino, norm=false"]["pixels"]["value"] == by_name["pixels", "dino", ("norm",)].main_score.value
    alone = ssl_bench.run(
        checkpoints[0], "knn/moca-paper", dataset="digits", limit=250, settings={"temperature": 0.2}, results=root / "x"
    )
    assert scores["knn/moca-paper, temperature=0.2"]["with"]["value"] == alone[0].main_score.value

    skipped = {(each["variant"], each["checkpoint"]): each["why"] for each in found["skipped"]}
    assert skipped["knn/dino", "without"] == "the network has no class token"
    assert "is more than the bank's " in skipped["knn/extrema", "with"]
    assert "knn/extrema" not in scores
    assert set(scores["knn/dino"]) == {"with", "pixels"}

    models = scores["knn/moca-paper"]
    a, b = (load_samples(by_name[model, "moca-paper", ()]) for model in ("with", "pixels"))
    wins, losses = int((a.correct & ~b.correct).sum()), int((b.correct & ~a.correct).sum())
    duel = next(d for d in found["duels"] if (d["variant"], d["a"], d["b"]) == ("knn/moca-paper", "with", "pixels"))
    assert duel["difference"] == pytest.approx(models["with"]["value"] - models["pixels"]["value"])
    assert (
        paired.mcnemar(wins, losses) <= duel["p"] <= min(1, len(found["duels"]) * paired.mcnemar(wins, losses)) + 1e-12
    )

    monkeypatch.setattr(knn, "run", lambda *_: pytest.fail("the second call computed something"))
    monkeypatch.setattr(features, "load", lambda *_: pytest.fail("the second call read images"))
    code, out, _ = call(*arguments)
    assert code == 0
    for text in (
        "knn/ibot reports the same as knn/dino.",
        "Left out for without: ",
        "the network has no class token.",
        "top1 on digits (--limit 250)",
        "Does the order depend on the protocol? ",
        found["verdict"],
    ):
        assert text in out


def test_a_variant_that_one_checkpoint_alone_can_serve_is_not_computed(root, checkpoints):
    found = module.sensitivity(checkpoints[:2], running.Options(dataset="digits", limit=250))
    assert "knn/moca-paper" in found.records
    assert "knn/dino" not in found.records
    assert ("knn/dino", "without", "the network has no class token") in found.skipped
    assert all(set(of) == {"with", "without"} for of in found.records.values())
    assert {record.recipe for record in load_results(root)} == {"moca-paper", "moca-code", "mmc-patch"}


def test_fewer_or_equal_checkpoints_are_refused(call, tmp_path, checkpoints):
    code, _, err = call("sensitivity", "--ckpt", "pixels:")
    assert code == 2
    assert "expected two different checkpoints or more, found pixels:" in err
    assert call("sensitivity", "--ckpt", "pixels:", "--ckpt", "pixels:")[0] == 2
    copy = tmp_path / "copy.pt"
    copy.write_bytes(Path(checkpoints[0]).read_bytes())
    code, _, err = call("sensitivity", "--ckpt", checkpoints[0], "--ckpt", copy, "-d", "digits")
    assert code == 2
    assert "hold the same weights" in err


def test_what_cannot_be_opened_is_said_before_anything_is_computed(call, checkpoints, monkeypatch):
    monkeypatch.setattr(features, "load", lambda *_: pytest.fail("images were read"))
    wrongs = {
        "none.pt": ["none.pt", "-d", "digits"],
        "unknown dataset 'digit'": ["pixels:", "-d", "digit"],
        "--limit 0: expected": ["pixels:", "-d", "digits", "--limit", "0"],
        "unknown --dtype 'fp8'": ["pixels:", "-d", "digits", "--dtype", "fp8"],
    }
    for message, wrong in wrongs.items():
        code, out, err = call("sensitivity", "--ckpt", checkpoints[0], "--ckpt", *wrong)
        assert (code, out) == (2, "")
        assert message in err


def test_nothing_in_common_is_an_error(image_folder, checkpoints):
    few = str(image_folder(train=2))
    with pytest.raises(UserError, match=r"no variant can be taken of two .* is more than the bank's 4 images"):
        module.sensitivity(checkpoints[:2], running.Options(dataset=few, workers=0))


def test_two_of_one_name_are_told_apart(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"{seed}").mkdir()
        save_checkpoint(tmp_path / f"{seed}" / "same.pt", tiny_backbone(seed))
    options = running.Options(dataset="digits", limit=250, results=tmp_path / "results")
    found = module.sensitivity([str(tmp_path / f"{seed}" / "same.pt") for seed in (0, 1)], options)
    names = set(found.records["knn/moca-paper"])
    assert len(names) == 2
    assert all(name.startswith("same · ") for name in names)


def found_with(swaps: list[agreement.Swap], duels: list[agreement.Duel]) -> module.Sensitivity:
    return module.Sensitivity("toy", None, {"x": {}, "y": {}}, [], {}, {}, duels, swaps)


def test_the_verdict_is_plain():
    outcomes = {n: np.arange(200) < n for n in (50, 53, 100)}
    stay = agreement.duels({v: {"a": outcomes[100], "b": outcomes[50]} for v in "xy"})
    chance = agreement.duels({"x": {"a": outcomes[53], "b": outcomes[50]}, "y": {"a": outcomes[50], "b": outcomes[53]}})
    real = agreement.duels({"x": {"a": outcomes[100], "b": outcomes[50]}, "y": {"a": outcomes[50], "b": outcomes[100]}})
    verdicts = [found_with(agreement.swaps(duels), duels).verdict() for duels in (stay, chance, real)]
    assert verdicts[0].startswith("No: the order of the checkpoints is the same under all 2 variants")
    assert verdicts[1].startswith("Not that these images could tell: 1 of 1 pairs of checkpoints swap order")
    assert verdicts[2].startswith(
        "Yes: 1 of 1 pairs of checkpoints swap order significantly. a is better than b under x"
    )
