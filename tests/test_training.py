"""The loop of protocols that train: what it keeps of the scores on the way, and what it does with a state file."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from ssl_bench.evaluate import cache
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.protocols import state_file
from ssl_bench.protocols.training import Course, History, train

LABELS = np.array([0, 1, 2, 1])
COURSE = Course(title="", identity={"a": 1}, images=9, batch=2, epochs=3, seed=5, evaluate_epochs=1)


@pytest.fixture(autouse=True)
def _own(own_cache):
    """State files of a test are its own."""


class Counter:
    """Learns nothing, but knows its steps and draws one number in each."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.drawn: list[float] = []
        self.fail_at = -1

    def step(self, views: Views, now: Progress) -> None:
        assert views.draws[0].item() == now.step
        if now.step == self.fail_at:
            raise RuntimeError("power cut")
        self.steps.append(now.step)
        self.drawn.append(torch.rand(()).item())

    def predict(self) -> np.ndarray:
        return np.array([[0, 1, 0, 0], [len(self.steps) % 3, 1, 2, 1]])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "drawn": list(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.drawn = list(state["steps"]), list(state["drawn"])


def numbered(start: int, stop: int) -> Generator[Views, None, None]:
    for step in range(start, stop):
        yield Views((torch.zeros(2, 1),), (torch.tensor(step),))


def test_it_takes_every_step_once_and_scores_after_every_epoch():
    learner = Counter()
    history = train(COURSE, learner, numbered, LABELS)
    assert learner.steps == list(range(12))  # 9 images are 4 batches of 2
    assert len(set(learner.drawn)) == 12  # each step has random numbers of its own
    assert history.epochs == [1, 2, 3]
    # After 4 and 8 steps the second variant has the first image wrong (4 % 3, 8 % 3), after 12 right.
    assert history.accuracies == [[50.0, 75.0], [50.0, 75.0], [50.0, 100.0]]
    assert history.best is not None
    assert history.best.tolist() == history.last.tolist() == [[0, 1, 0, 0], [0, 1, 2, 1]]


@pytest.mark.parametrize(("every", "epochs"), [(None, [3]), (2, [2, 3]), (3, [3])])
def test_val_is_scored_as_often_as_asked_and_at_the_end(every, epochs):
    assert train(dataclasses.replace(COURSE, evaluate_epochs=every), Counter(), numbered, LABELS).epochs == epochs


def test_the_best_is_each_variants_own_and_the_earlier_of_equally_good_epochs():
    history = History()
    history.add(1, np.array([[0, 0], [1, 1]]), np.array([0, 2]))
    history.add(2, np.array([[1, 2], [0, 1]]), np.array([0, 2]))
    history.add(3, np.array([[1, 1], [1, 2]]), np.array([0, 2]))
    assert history.best.tolist() == [[0, 0], [0, 1]]
    assert history.last.tolist() == [[1, 1], [1, 2]]


def test_after_a_crash_it_goes_on_from_the_last_saved_state(monkeypatch, capsys):
    whole = Counter()
    expected = train(COURSE, whole, numbered, LABELS)
    monkeypatch.setattr(state_file, "SAVE_SECONDS", 0.0)  # after every step
    broken = Counter()
    broken.fail_at = 7
    with pytest.raises(RuntimeError, match="power cut"):
        train(COURSE, broken, numbered, LABELS)
    again = Counter()
    history = train(COURSE, again, numbered, LABELS)
    assert "after step 7" in capsys.readouterr().err
    assert (again.steps, again.drawn) == (whole.steps, whole.drawn)
    assert (history.epochs, history.accuracies) == (expected.epochs, expected.accuracies)


@pytest.mark.parametrize("change", [{"identity": {"a": 2}}, {"seed": 6}, {"batch": 3}, {"epochs": 4}])
def test_another_training_does_not_go_on_with_this_ones_state(monkeypatch, change):
    monkeypatch.setattr(state_file, "SAVE_SECONDS", 0.0)
    broken = Counter()
    broken.fail_at = 5
    with pytest.raises(RuntimeError):
        train(COURSE, broken, numbered, LABELS)
    other = Counter()
    train(dataclasses.replace(COURSE, **change), other, numbered, LABELS)
    assert other.steps[0] == 0
    assert len(set(other.steps)) == len(other.steps)


def test_a_damaged_state_counts_as_none(monkeypatch, own_cache, capsys):
    monkeypatch.setattr(state_file, "SAVE_SECONDS", 0.0)
    broken = Counter()
    broken.fail_at = 5
    with pytest.raises(RuntimeError):
        train(COURSE, broken, numbered, LABELS)
    (path,) = (own_cache / "training").glob("*.pt")
    path.write_bytes(path.read_bytes()[:100])
    learner = Counter()
    train(COURSE, learner, numbered, LABELS)
    assert learner.steps == list(range(12))
    assert "training begins anew" in capsys.readouterr().err
    assert not path.exists()


def test_an_interrupted_training_is_collected_when_it_is_old(monkeypatch, own_cache):
    monkeypatch.setattr(state_file, "SAVE_SECONDS", 0.0)
    broken = Counter()
    broken.fail_at = 5
    with pytest.raises(RuntimeError):
        train(COURSE, broken, numbered, LABELS)
    (path,) = (own_cache / "training").glob("*.pt")
    cache.collect_garbage(everything=True)
    assert path.exists()  # it may be running
    os.utime(path, (0, time.time() - 2 * 86400))
    cache.collect_garbage(unused_days=3)
    assert path.exists()
    cache.collect_garbage(unused_days=1)
    assert not path.exists()
