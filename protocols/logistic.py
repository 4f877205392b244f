"""L2-regularized logistic regression without intercept, solved until a bound says that it is solved.

    minimize over W (C, d)    P(W) = 1/n sum_i CE(W x_i, y_i) + penalty/2 ||W||^2

which is what cyanure minimizes, the papers' solver (Mairal 2019), and scikit-learn with C = 1 / (n penalty).

The gap. P is `penalty`-strongly convex, so P(W) - min P <= ||grad P(W)||^2 / (2 penalty). By Fenchel and Young this is
also the duality gap at the dual point (softmax(W x_i) - y_i) / n. So every point gives a lower bound on the minimum,
and the best of them is kept. The last is calculated in float64, whatever the arithmetic before.

The solver `lbfgs`. Features are turned to their principal axes, which leaves the problem as it is; with fewer images
than dimensions only the span of the images is kept, where the minimizer must lie. There the Hessian is close to
s E + penalty, with E the variances along the axes and s the mean curvature of the softmax: a diagonal, shared by all
classes, from which L-BFGS starts at every step. Most of the work is done in float32.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import FloatArray
from ssl_bench.evaluate.subject import IntArray

TOLERANCE = 5e-10  # of the gap, relative to the objective: closer than cyanure comes at its own settings
_SMALL = 1e8  # multiplications a product of features and weights: less is done in float64 from the start
_PAIRS = 5  # of steps and changes of the gradient that L-BFGS remembers; more save few iterations, and cost time
_MOST = 2000  # iterations; a few dozen are usual
_LOGITS = 2**23  # as many at a time: what lies between two products stays near the processor


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights, and how good they are."""

    weight: Tensor  # (C, d) float64, on the CPU
    objective: float  # in float64
    gap: float | None  # an upper bound on objective - minimum; None for penalty 0, where none is known
    iterations: int
    solver: str


def solve_lbfgs(
    features: FloatArray,
    labels: IntArray,
    *,
    classes: int,
    penalty: float,
    device: str = "cpu",
    tolerance: float = TOLERANCE,
) -> Solution:
    """Ours: the gap is at most `tolerance` times the objective (or what float64 allows)."""
    device = "cpu" if device == "mps" else device  # which has no float64
    rows = torch.from_numpy(np.ascontiguousarray(features)).to(device)
    assert rows.isfinite().all()
    turned, axes, variances = _principal_axes(rows)
    weight = torch.zeros(classes, turned.shape[1], dtype=torch.float64, device=device)
    descent, targets = _Descent(variances), torch.from_numpy(labels).to(device)
    if rows.shape[0] * rows.shape[1] * classes > _SMALL:
        coarse, _ = descent.run(
            _Problem(turned.float(), targets, penalty), weight.float(), max(tolerance, TOLERANCE) / 2
        )
        weight = coarse.weight.double()
    point, gap = descent.run(_Problem(turned, targets, penalty), weight, tolerance)
    if not penalty:
        descent.require_rest(point.weight)
    return Solution((point.weight @ axes.T).cpu(), point.value, gap if penalty else None, descent.iterations, "lbfgs")


def solve_cyanure(
    features: FloatArray, labels: IntArray, *, classes: int, penalty: float, device: str = "cpu"
) -> Solution:
    """The papers': float32, tolerance 1e-3, tested every 10 passes over the data, at most 300 (MSN, logistic_eval.py).

    It takes two classes for a binary problem, one vector v with W = (-v/2, v/2), whose penalty is half of ours.
    """
    from cyanure.estimators import Classifier

    assert len(np.unique(labels)) == classes > 1
    assert penalty > 0
    model = Classifier(
        loss="multiclass-logistic" if classes > 2 else "logistic",
        penalty="l2",
        fit_intercept=False,
        lambda_1=penalty if classes > 2 else penalty / 2,
        solver="auto",
        tol=1e-3,
        duality_gap_interval=10,
        max_iter=300,
        random_state=0,
        n_threads=torch.get_num_threads(),
        verbose=False,  # it would write on stdout
    )
    rows = np.ascontiguousarray(features, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stopped early: the gap says so
        model.fit(rows, labels.astype(np.int32))
    found = np.asarray(model.coef_, dtype=np.float64)  # (d, C), or of two classes (d,)
    weight = torch.from_numpy(found.T.copy() if classes > 2 else np.stack([-found / 2, found / 2]))
    point = _Problem(torch.from_numpy(rows).double(), torch.from_numpy(labels), penalty)(weight)
    gap = point.value - max(0.0, _lower_bound(point, penalty))
    return Solution(weight, point.value, gap, int(np.max(model.n_iter_)), "cyanure")


SOLVERS: dict[str, Callable[..., Solution]] = {"lbfgs": solve_lbfgs, "cyanure": solve_cyanure}


def _principal_axes(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates (n, r), orthonormal axes (d, r) and variances (r,), in float64; r = min(n, d). Nothing is dropped."""
    n, d = rows.shape
    span = None
    if n < d:
        span, triangle = torch.linalg.qr(rows.double().T)
        rows = triangle.T
    moment = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in torch.split(rows, 8192):
        moment.addmm_(block.double().T, block.double(), alpha=1 / n)
    with _one_thread():
        variances, axes = torch.linalg.eigh(moment)
    turned = torch.cat([block.double() @ axes for block in torch.split(rows, 8192)])
    return turned, axes if span is None else span @ axes, variances.clamp_(min=0)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """An eigendecomposition on two threads is twice as slow, and where another process is at work fifty times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False)
class _Point:
    """What one evaluation tells."""

    weight: Tensor
    value: float
    gradient: Tensor
    missed: float  # mean of 1 - p_y
    hardest: float  # least p_y


class _Problem:
    """P and its gradient, over blocks of rows."""

    def __init__(self, features: Tensor, labels: Tensor, penalty: float) -> None:
        self.features, self.labels, self.penalty = features, labels[:, None], penalty

    def __call__(self, weight: Tensor) -> _Point:
        n, gradient = len(self.features), self.penalty * weight
        loss = missed = 0.0
        hardest = 1.0
        rows = max(1, _LOGITS // len(weight))
        for features, labels in zip(torch.split(self.features, rows), torch.split(self.labels, rows), strict=True):
            logits = torch.log_softmax(features @ weight.T, dim=1)
            own = logits.gather(1, labels).double()
            loss -= own.sum().item()
            own.exp_()
            missed += (1 - own).sum().item()
            hardest = min(hardest, own.min().item())
            residual = logits.exp_()  # softmax - one-hot, in the same memory
            residual.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=residual.dtype))
            gradient.addmm_(residual.T, features, alpha=1 / n)
        value = loss / n + self.penalty / 2 * weight.double().square().sum().item()
        return _Point(weight, value, gradient, missed / n, hardest)


def _lower_bound(point: _Point, penalty: float) -> float:
    """On the minimum of P; without a penalty only that a loss is not negative."""
    return point.value - point.gradient.double().square().sum().item() / (2 * penalty) if penalty else 0.0


class _Descent:
    """L-BFGS (Nocedal and Wright, Algorithm 7.5), from float32 to float64 with the memory of where it was."""

    def __init__(self, variances: Tensor) -> None:
        self.variances = variances
        self.pairs: list[tuple[Tensor, Tensor, float]] = []  # step, change of the gradient, their product
        self.iterations = 0

    def run(self, problem: _Problem, weight: Tensor, tolerance: float) -> tuple[_Point, float]:
        """Until the gap is within the tolerance or rounding allows no further step. The last point, and its gap."""
        self.pairs = [(step.to(weight), change.to(weight), product) for step, change, product in self.pairs]
        point, lower = problem(weight), 0.0
        while True:
            lower = max(lower, _lower_bound(point, problem.penalty))
            gap = point.value - lower
            if gap <= tolerance * point.value or self.iterations == _MOST:
                break
            if not problem.penalty and point.hardest > 0.5:
                raise _no_optimum("they are separable")
            direction = self._direction(point, problem.penalty)
            if not problem.penalty and -_dot(point.gradient, direction) < 2 * tolerance**1.5 * point.value:
                break  # what a Newton step would gain: with no penalty there is no bound, and this must do
            following = _search(problem, point, direction)
            if following is None:
                break
            self._remember(point, following)
            point = following
            self.iterations += 1
        return point, gap

    def _direction(self, point: _Point, penalty: float) -> Tensor:
        """Minus the inverse Hessian, as the pairs and the diagonal have it, times the gradient."""
        scale = point.missed / len(point.weight)  # p_y (1 - p_y) is one class's; the others share the rest
        diagonal = scale * self.variances.to(point.weight) + penalty
        diagonal.clamp_(
            min=max(1e-12 * diagonal.max().item(), 1e-30)
        )  # without a penalty: axes along which nothing varies
        result, kept = point.gradient.clone(), []
        for step, change, product in reversed(self.pairs):
            share = _dot(step, result) / product
            result.sub_(change, alpha=share)
            kept.append(share)
        if self.pairs:
            _, change, product = self.pairs[-1]
            result.mul_(product / _dot(change, change / diagonal))
        result.div_(diagonal)
        for (step, change, product), share in zip(self.pairs, reversed(kept), strict=True):
            result.add_(step, alpha=share - _dot(change, result) / product)
        return result.neg_()

    def _remember(self, before: _Point, after: _Point) -> None:
        step, change = after.weight - before.weight, after.gradient - before.gradient
        if (product := _dot(step, change)) > 0:
            self.pairs = [*self.pairs, (step, change, product)][-_PAIRS:]

    def require_rest(self, weight: Tensor) -> None:
        """Without a penalty: where the weights still grow, no finite ones are the best."""
        step = self.pairs[-1][0] if self.pairs else torch.zeros_like(weight)
        if self.iterations == _MOST or step.norm() > 1e-3 * weight.norm():
            raise _no_optimum("some can be told from the others without error")


def _no_optimum(reason: str) -> UserError:
    return UserError(
        f"with lambda 0 these training images have no best finite weights: {reason}, so larger weights are always "
        "better. Expected a positive lambda; for example --set lambdas=0.1"
    )


def _search(problem: _Problem, point: _Point, direction: Tensor) -> _Point | None:
    """A step that meets Wolfe's conditions, or None if rounding hides it.

    Near the minimum values differ by less than their rounding and slopes tell more: a value that is no worse but for
    rounding will do where the slope has fallen (Hager and Zhang 2005, Eq. 4.1).
    """
    slope = _dot(point.gradient, direction)
    rounding = 64 * torch.finfo(direction.dtype).eps * abs(point.value)
    length, low, high = 1.0, (0.0, slope), (math.inf, 0.0)  # lengths, and the slopes there
    for _ in range(20):
        if slope >= 0:
            return None
        found = problem(point.weight + length * direction)
        here = _dot(found.gradient, direction)
        lower = found.value <= point.value + 1e-4 * length * slope
        as_low = found.value <= point.value + rounding and here <= -0.8 * slope
        if not (lower or as_low):
            high = (length, here)
        elif here < 0.9 * slope:
            low = (length, here)
        else:
            return found
        if math.isinf(high[0]):
            length *= 3
        else:  # where the line between the two slopes is zero, within the middle eight tenths
            share = low[1] / (low[1] - high[1]) if high[1] > 0 else 0.5
            length = low[0] + min(0.9, max(0.1, share)) * (high[0] - low[0])
    return None


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))
