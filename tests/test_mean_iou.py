"""Mean IoU against a confusion matrix filled pixel by pixel, and against mmseg's metric."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ssl_bench.errors import UserError
from ssl_bench.evaluate.masks import IGNORE
from ssl_bench.protocols.openmm.mean_iou import Counts, MeanIoU, bootstrap_error, by_class, counts

Labels = npt.NDArray[np.int64]
CLASSES = 7  # of which 5 is predicted only, and 6 does not occur


def _images(n: int = 6) -> list[tuple[Labels, Labels]]:
    """Predictions and labels, a fifth of them ignored, of different sizes; some images are better than others."""
    rng = np.random.default_rng(3)
    images = []
    for number in range(n):
        size = (9 + number, 12)
        labels = rng.integers(0, 5, size)
        wrong = rng.random(size) < 0.2 + 0.1 * number
        predicted = np.where(wrong, rng.integers(0, 6, size), labels)
        images.append((predicted, np.where(rng.random(size) < 0.2, IGNORE, labels)))
    return images


def _confusion(images: list[tuple[Labels, Labels]]) -> Labels:
    """Rows: labels, columns: predictions."""
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for predicted, labels in images:
        for p, q in zip(predicted.ravel().tolist(), labels.ravel().tolist(), strict=True):
            if q != IGNORE:
                matrix[q, p] += 1
    return matrix


def _read(images: list[tuple[Labels, Labels]]) -> list[Counts]:
    metric = MeanIoU(CLASSES)
    return [
        metric.read({"pred_sem_seg": {"data": torch.tensor(p)[None]}, "gt_sem_seg": {"data": torch.tensor(q)[None]}})
        for p, q in images
    ]


def _slow(matrix: Labels) -> tuple[list[float | None], list[float | None]]:
    ious, accuracies = [], []
    for c in range(CLASSES):
        union = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
        ious.append(100 * matrix[c, c] / union if union else None)
        accuracies.append(100 * matrix[c, c] / matrix[c].sum() if matrix[c].sum() else None)
    return ious, accuracies


def _mean(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there)


def test_scores_are_those_of_a_confusion_matrix() -> None:
    images = _images()
    matrix = _confusion(images)
    ious, accuracies = _slow(matrix)
    scores = MeanIoU(CLASSES).scores(_read(images))
    assert scores["main"] == pytest.approx(_mean(ious), abs=1e-9)
    assert scores["macc"] == pytest.approx(_mean(accuracies), abs=1e-9)
    assert scores["aacc"] == pytest.approx(100 * np.trace(matrix) / matrix.sum(), abs=1e-9)
    assert scores["iou"] == pytest.approx(ious)
    assert scores["accuracy"] == pytest.approx(accuracies)
    assert (scores["iou"][5], scores["accuracy"][5]) == (0.0, None)  # predicted, never right
    assert (scores["iou"][6], scores["accuracy"][6]) == (None, None)


def test_scores_are_mmsegs_before_it_rounds() -> None:
    from ssl_bench.protocols.openmm import packages

    packages.require()
    from mmseg.evaluation import IoUMetric

    from ssl_bench.protocols.openmm.quiet import quiet

    images = _images()
    with quiet():
        metric = IoUMetric(ignore_index=IGNORE)
        metric.dataset_meta = {"classes": [str(c) for c in range(CLASSES)]}
        for p, q in images:
            metric.process({}, [{"pred_sem_seg": {"data": torch.tensor(p)}, "gt_sem_seg": {"data": torch.tensor(q)}}])
        theirs = metric.compute_metrics(metric.results)
    scores = MeanIoU(CLASSES).scores(_read(images))
    ours = {"mIoU": scores["main"], "mAcc": scores["macc"], "aAcc": scores["aacc"]}
    assert ours == pytest.approx({name: float(theirs[name]) for name in ours}, abs=0.006)


def test_ignored_pixels_count_nowhere() -> None:
    labels = torch.tensor([[0, 1, IGNORE], [1, IGNORE, 0]])
    first = torch.tensor([[0, 0, 2], [1, 2, 0]])
    second = torch.where(labels == IGNORE, 1, first)
    assert not torch.equal(first, second)
    np.testing.assert_array_equal(counts(first, labels, 3), [[2, 1, 0], [3, 1, 0], [2, 2, 0]])
    np.testing.assert_array_equal(counts(first, labels, 3), counts(second, labels, 3))


def test_labels_outside_the_classes_are_noticed() -> None:
    with pytest.raises(AssertionError, match="outside"):
        counts(torch.tensor([0, 1]), torch.tensor([0, 2]), 2)


def test_nothing_labeled_is_refused() -> None:
    nothing = counts(torch.zeros(2, 2), torch.full((2, 2), IGNORE), CLASSES)
    with pytest.raises(UserError, match="no pixel of val has a label"):
        MeanIoU(CLASSES).scores([nothing])


def test_the_standard_error_is_that_of_drawing_images_anew() -> None:
    """By indices instead of weights, with other random numbers, one image after another."""
    per_image = np.stack(_read(_images(12)))
    rng = np.random.default_rng(99)
    values = []
    for _ in range(3000):
        total = np.zeros((3, CLASSES))
        for index in rng.integers(0, len(per_image), len(per_image)):
            total += per_image[index]
        ious = by_class(total)[0]
        values.append(np.nanmean(ious))
    error = bootstrap_error(per_image)
    assert error == pytest.approx(np.std(values), rel=0.12)
    assert error == bootstrap_error(per_image)  # no luck in it
    assert bootstrap_error(per_image[:1]) is None
