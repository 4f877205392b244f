"""The solvers against scikit-learn, against Newton's method in numpy, against each other, and the bound on the gap."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ssl_bench.errors import UserError
from ssl_bench.protocols import logistic
from ssl_bench.protocols.logistic import SOLVERS, solve_cyanure, solve_lbfgs


def problem(n=60, dim=7, classes=4, seed=0, noise=1.0):
    """Unit vectors around class centers, every class there."""
    rng = np.random.RandomState(seed)
    labels = rng.permutation(np.arange(n) % classes)
    rows = rng.randn(classes, dim)[labels] + noise * rng.randn(n, dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def objective(features, labels, weight, penalty):
    """As the docstring has it, one image at a time."""
    losses = []
    for row, label in zip(features.astype(np.float64), labels, strict=True):
        logits = weight @ row
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    return np.mean(losses) + penalty / 2 * (weight**2).sum()


def newton(features, labels, classes, penalty):
    """Damped Newton on the whole Hessian in float64."""
    rows, (n, dim) = features.astype(np.float64), features.shape
    weight = np.zeros((classes, dim))
    for _ in range(100):
        logits = rows @ weight.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = (p - np.eye(classes)[labels]).T @ rows / n + penalty * weight
        hessian = penalty * np.eye(classes * dim)
        for i in range(n):
            hessian += np.kron(np.diag(p[i]) - np.outer(p[i], p[i]), np.outer(rows[i], rows[i])) / n
        step = np.linalg.solve(hessian, gradient.ravel()).reshape(weight.shape)
        length, here = 1.0, objective(features, labels, weight, penalty)
        while objective(features, labels, weight - length * step, penalty) > here and length > 1e-9:
            length /= 2
        weight -= length * step
    return weight


@pytest.mark.parametrize(("n", "dim"), [(60, 7), (12, 30)])
@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_minimum_is_that_of_newton_and_of_scikit_learn(n, dim, penalty):
    features, labels = problem(n, dim)
    found = solve_lbfgs(features, labels, classes=4, penalty=penalty, tolerance=1e-13)
    peer = LogisticRegression(C=1 / (n * penalty), fit_intercept=False, tol=1e-10, max_iter=10_000)
    peer.fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(found.weight.numpy(), peer.coef_, atol=1e-5)
    if dim < 10:
        np.testing.assert_allclose(found.weight.numpy(), newton(features, labels, 4, penalty), atol=1e-6)
    assert found.objective == pytest.approx(objective(features, labels, peer.coef_, penalty), rel=1e-9)
    assert found.objective == pytest.approx(objective(features, labels, found.weight.numpy(), penalty), rel=1e-12)


@pytest.mark.parametrize("in_float32_first", [True, False])
@pytest.mark.parametrize(("n", "dim", "classes"), [(120, 9, 12), (60, 200, 20), (40, 5, 2), (30, 60, 30)])
@pytest.mark.parametrize("of_all", [1e-2, 0.1, 1.0, 10.0])
def test_no_worse_than_cyanure(n, dim, classes, of_all, in_float32_first, monkeypatch):
    """Down to 5e-10 of the objective, where the gap lets us stop."""
    monkeypatch.setattr(logistic, "_SMALL", 0 if in_float32_first else 1e8)
    features, labels = problem(n, dim, classes, seed=n)
    ours = solve_lbfgs(features, labels, classes=classes, penalty=of_all / n)
    theirs = solve_cyanure(features, labels, classes=classes, penalty=of_all / n)
    assert ours.objective <= theirs.objective * (1 + 5e-10)
    assert 0 <= ours.gap <= 5.001e-10 * ours.objective
    assert ours.objective >= theirs.objective - theirs.gap * (1 + 1e-9)  # their gap bounds too
    assert theirs.objective == pytest.approx(ours.objective, rel=0.05)  # the same problem: classes, scaling, penalty
    assert theirs.weight.shape == ours.weight.shape == (classes, dim)


@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-2, 1e-4, 1e-6])
def test_the_gap_bounds_the_distance_to_the_minimum(tolerance):
    for seed in range(6):
        features, labels = problem(50, 11, 5, seed=seed)
        minimum = solve_lbfgs(features, labels, classes=5, penalty=2e-3, tolerance=1e-13).objective
        early = solve_lbfgs(features, labels, classes=5, penalty=2e-3, tolerance=tolerance)
        assert early.gap <= tolerance * early.objective
        assert minimum * (1 - 1e-12) <= early.objective <= minimum + early.gap + 1e-13


def test_it_stops_early_when_little_is_asked():
    features, labels = problem(50, 11, 5)
    iterations = [
        solve_lbfgs(features, labels, classes=5, penalty=2e-3, tolerance=tolerance).iterations
        for tolerance in (1e-1, 1e-4, 1e-8)
    ]
    assert 0 < iterations[0] < iterations[1] < iterations[2] < 60


def test_the_gradient_is_that_of_the_objective_whatever_the_blocks(monkeypatch):
    features, labels = problem(23, 6, 4)
    rng = np.random.RandomState(1)
    weight, direction = rng.randn(4, 6), rng.randn(4, 6)
    found = logistic._Problem(torch.from_numpy(features).double(), torch.from_numpy(labels), 0.3)(torch.tensor(weight))
    assert found.value == pytest.approx(objective(features, labels, weight, 0.3), rel=1e-12)
    ahead, behind = (objective(features, labels, weight + t * direction, 0.3) for t in (1e-5, -1e-5))
    assert (found.gradient.numpy() * direction).sum() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)
    logits = features @ weight.T
    p = np.exp(logits[np.arange(23), labels]) / np.exp(logits).sum(1)
    assert (found.missed, found.hardest) == (pytest.approx((1 - p).mean()), pytest.approx(p.min()))
    monkeypatch.setattr(logistic, "_LOGITS", 12)  # three rows at a time
    again = logistic._Problem(torch.from_numpy(features).double(), torch.from_numpy(labels), 0.3)(torch.tensor(weight))
    assert again.value == pytest.approx(found.value, rel=1e-14)
    torch.testing.assert_close(again.gradient, found.gradient)


@pytest.mark.parametrize(("n", "dim"), [(30, 8), (8, 30), (8, 8)])
def test_principal_axes_turn_and_drop_nothing(n, dim):
    rows = torch.from_numpy(problem(n, dim, 2)[0])
    turned, axes, variances = logistic._principal_axes(rows)
    r = min(n, dim)
    assert (turned.shape, axes.shape, variances.shape) == ((n, r), (dim, r), (r,))
    torch.testing.assert_close(axes.T @ axes, torch.eye(r, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(turned @ axes.T, rows.double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(turned.T @ turned / n, variances.diag(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_classes_are_one_binary_problem(solver):
    features, labels = problem(40, 6, 2)
    found = SOLVERS[solver](features, labels, classes=2, penalty=0.01)
    peer = LogisticRegression(C=2 / (40 * 0.01), fit_intercept=False, tol=1e-10, max_iter=10_000)
    peer.fit(features.astype(np.float64), labels)  # one vector v = w1 - w0, of penalty 0.01 / 2
    np.testing.assert_allclose((found.weight[1] - found.weight[0]).numpy(), peer.coef_[0], atol=0.05)
    assert found.objective == pytest.approx(objective(features, labels, found.weight.numpy(), 0.01), rel=1e-9)


def test_cyanure_leaves_stdout_and_warnings_alone(capfd):
    features, labels = problem(200, 20, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve_cyanure(features, labels, classes=10, penalty=1e-8)  # too little for float32, and for 300 passes
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_without_penalty_where_classes_overlap():
    features, labels = problem(200, 4, 3, noise=2.0)
    found = solve_lbfgs(features, labels, classes=3, penalty=0.0)
    assert found.gap is None
    peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-9, max_iter=10_000)
    peer.fit(features.astype(np.float64), labels)
    assert found.objective == pytest.approx(objective(features, labels, peer.coef_, 0.0), rel=1e-9)


def test_without_penalty_separable_images_have_no_optimum():
    features, labels = problem(10, 30, 3)
    with pytest.raises(UserError, match=r"separable.*--set lambdas=0.1"):
        solve_lbfgs(features, labels, classes=3, penalty=0.0)


def test_without_penalty_images_that_are_separable_in_part_have_no_optimum():
    """Two classes lie on top of each other, the third is apart: its weight would grow forever."""
    rng = np.random.RandomState(0)
    near = np.concatenate([rng.randn(40, 2), np.zeros((40, 1))], axis=1)
    far = np.tile([[0.0, 0.0, 1.0]], (10, 1))
    features, labels = np.concatenate([near, far]).astype(np.float32), np.repeat([0, 1, 2], [20, 20, 10])
    with pytest.raises(UserError, match="no best finite weights"):
        solve_lbfgs(features, labels, classes=3, penalty=0.0)


def test_features_of_zeros_tell_nothing():
    labels = np.arange(12) % 3
    for penalty in (0.0, 0.1):
        found = solve_lbfgs(np.zeros((12, 5), np.float32), labels, classes=3, penalty=penalty)
        assert found.weight.abs().max() == 0
        assert found.objective == pytest.approx(np.log(3))


def test_repeated_rows_weigh_as_the_same_rows_once():
    features, labels = problem(20, 30)
    once = solve_lbfgs(features, labels, classes=4, penalty=0.01, tolerance=1e-13)
    thrice = solve_lbfgs(np.tile(features, (3, 1)), np.tile(labels, 3), classes=4, penalty=0.01, tolerance=1e-13)
    torch.testing.assert_close(once.weight, thrice.weight, atol=1e-6, rtol=0)


def test_one_class_costs_nothing():
    features, _ = problem(8, 5)
    found = solve_lbfgs(features, np.zeros(8, dtype=np.int64), classes=1, penalty=0.1)
    assert (found.objective, found.gap) == (0.0, 0.0)
