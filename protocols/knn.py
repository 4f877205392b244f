"""k-nearest neighbors on frozen features.

    ssl-bench run --ckpt x.pth --protocol knn             the first row below, DINO's
    ssl-bench run --ckpt x.pth --protocol knn/moca-code --set neighbors=20

Every image of the training set is a vector in the bank. A test image takes its k most similar bank vectors (cosine);
each votes for its class with weight exp(similarity / temperature). (Wu et al. 2018, Eq. 7; DINO, eval_knn.py.)

Papers differ in k, temperature and in what the vector is, and the order of methods can change with them, so each paper
is a row of RECIPES and there is no such thing as "the" k-NN accuracy.

The search is exact. It runs over blocks of the bank in quick arithmetic (bf16 where the processor has it), keeps the k
best and a few more, and computes the similarities of those few again in float64. A bound on the rounding says for which
queries that is certain; the others are searched in float32, and what is uncertain then, in float64 throughout. So the
answer is that of a float64 brute force, whatever the device, the number of threads or the memory budget. Equally
similar neighbors are taken in the order of the bank, and a tied vote goes to the first class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.evaluate.hardware import cpu_has_bf16
from ssl_bench.evaluate.readings import Interpolation, Reading, Token
from ssl_bench.evaluate.subject import IntArray, Scores, Subject, accuracy
from ssl_bench.evaluate.vectors import Vectors

VERSION = 1
DATA, DISTRIBUTED = "images", False

Vector = Literal["cls", "patch_mean", "cls+patch_mean"]


@dataclass(frozen=True)
class Recipe:
    """How one paper does it. With several neighbors, temperatures or vectors, `reported` says which is the result."""

    neighbors: tuple[int, ...]
    temperature: tuple[float, ...]
    vector: tuple[Vector, ...]
    reported: Literal["first", "best"]  # the first combination, or the best on the test set
    norm: bool  # the network's final norm
    bank_percent: float  # of the training images, drawn class by class
    resize_px: int
    crop_px: int
    interpolation: Interpolation
    source: str
    published: str
    layer: int = -1  # the block that is read, 0 the first, -1 the last: all papers read the last

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if min(self.neighbors) < 1:
            raise UserError(f"neighbors={self.neighbors}: expected at least 1.")
        if min(self.temperature) <= 0:
            raise UserError(f"temperature={self.temperature}: expected a positive number.")
        if not 0 < self.bank_percent <= 100:
            raise UserError(f"bank_percent={self.bank_percent}: expected more than 0, at most 100.")

    @property
    def selected_on(self) -> Literal["none", "test"]:
        """What the reported combination was chosen on."""
        choices = len(self.neighbors) * len(self.temperature) * len(self.vector)
        return "test" if self.reported == "best" and choices > 1 else "none"


_MOCA_TEMPERATURES = (0.04, 0.03, 0.05, 0.06, 0.07, 0.08, 0.10, 0.12, 0.15, 0.20)
_CLS: tuple[Vector, ...] = ("cls",)
_AVG: tuple[Vector, ...] = ("patch_mean",)
_BOTH: tuple[Vector, ...] = ("cls+patch_mean",)

# fmt: off
RECIPES: dict[str, Recipe] = {
    #                    neighbors           temperature         vector reported norm  bank  resize crop interpolation
    # DINO recommends k=20. iBOT's script is DINO's, with the same defaults.
    "dino":       Recipe((20, 10, 100, 200), (0.07,),            _CLS, "first", True, 100.0, 256, 224, "bicubic",
                         source="facebookresearch/dino eval_knn.py",
                         published="ImageNet: DINO ViT-S/16 74.5, ViT-B/16 76.1"),
    "ibot":       Recipe((20, 10, 100, 200), (0.07,),            _CLS, "first", True, 100.0, 256, 224, "bicubic",
                         source="bytedance/ibot evaluation/eval_knn.py, run.sh (avgpool_patchtokens 0)",
                         published="ImageNet: iBOT ViT-B/16 77.1 (MOCA Table 6)"),
    # The paper gives k=20 and the average patch token, but no temperature: assumption .07, as in DINO.
    "moca-paper": Recipe((20,),              (0.07,),            _AVG, "first", True, 100.0, 256, 224, "bicubic",
                         source="MOCA, appendix, k-NN ImageNet classification",
                         published="ImageNet: MOCA ViT-B/16 77.2 (Table 6), 400 epochs 77.6, ViT-L/16 78.4 (Table 11)"),
    # The released script reports the best of 2 x 10 combinations on the test set; its README's numbers are at .04.
    "moca-code":  Recipe((20, 10),           _MOCA_TEMPERATURES, _AVG, "best",  True, 100.0, 256, 224, "bicubic",
                         source="valeoai/MOCA eval_knn.py, util/knn_utils.py",
                         published="ImageNet: MOCA ViT-B/16 77.2 (Table 6)"),
    # MMC's comparison of head types: patch tokens, class token, and both ("Hyber"). k=10 and patches are the paper's
    # choice. No temperature is given: assumption .07.
    "mmc-patch":  Recipe((10, 20, 50, 100),  (0.07,),            _AVG, "first", True, 100.0, 256, 224, "bicubic",
                         source="MMC, appendix, Tables 6 and 11 (PAT)",
                         published="MMC: Pets 75.9, Flowers 66.0, CIFAR-10 84.9 (Table 6), IN-100 90.04 (Table 11)"),
    "mmc-cls":    Recipe((10, 20, 50, 100),  (0.07,),            _CLS, "first", True, 100.0, 256, 224, "bicubic",
                         source="MMC, appendix, Tables 6 and 11 (CLS)",
                         published="MMC: Pets 72.9, Flowers 63.5, CIFAR-10 84.5 (Table 6), IN-100 89.94 (Table 11)"),
    "mmc-hybrid": Recipe((10, 20, 50, 100),  (0.07,),            _BOTH, "first", True, 100.0, 256, 224, "bicubic",
                         source="MMC, appendix, Table 6 (Hyber; assumption: both vectors joined)",
                         published="MMC: Pets 75.0, Flowers 65.5, CIFAR-10 84.8 (Table 6)"),
    # k=200 and a bank of 10 %, for the training curves of Fig. 4. No temperature is given: assumption .07.
    "extrema":    Recipe((200,),             (0.07,),            _CLS, "first", True, 10.0,  256, 224, "bicubic",
                         source="ExtreMA, Fig. 4",
                         published="plotted only"),
}
# fmt: on


def readings(subject: Subject, recipe: Recipe) -> dict[str, list[Reading]]:
    """What k-NN reads of the network: a block's class token, its average patch token, or both."""
    view = subject.view(recipe.resize_px, recipe.crop_px, recipe.interpolation)
    tokens: list[Token] = list(dict.fromkeys(token for name in recipe.vector for token in _tokens(name)))
    read = [Reading(token, view, layer=recipe.layer, norm=recipe.norm) for token in tokens]
    return {"train": read, "val": read}


def check(subject: Subject, recipe: Recipe) -> None:
    """The same classes in both splits, and a bank that holds as many neighbors as are asked for."""
    subject.require_shared_classes()
    _check_bank(recipe, len(bank_rows(subject.split("train").labels, recipe.bank_percent, subject.seed)))


def _check_bank(recipe: Recipe, bank: int) -> None:
    if max(recipe.neighbors) > bank:
        fitting = [str(k) for k in recipe.neighbors if k <= bank] or [str(bank)]
        raise UserError(
            f"neighbors={max(recipe.neighbors)} is more than the bank's {bank} images; choose fewer, for example "
            f"--set neighbors={','.join(fitting)}, or a larger training set."
        )


def run(subject: Subject, recipe: Recipe) -> Scores:
    """Accuracy of every combination; the result is the one that the recipe reports."""
    reading = {each.token: each for each in readings(subject, recipe)["val"]}
    any_train, any_val = (subject.features(split, next(iter(reading.values()))) for split in ("train", "val"))
    train_labels, val_labels = subject.labels("train", any_train), subject.labels("val", any_val)
    kept = bank_rows(train_labels, recipe.bank_percent, subject.seed)
    _check_bank(recipe, len(kept))  # again, since broken images may have been left out
    classes = len(subject.split("train").classes)
    metrics, predicted = {}, {}
    for name in recipe.vector:
        bank = Vectors([subject.features("train", reading[token]).blocks() for token in _tokens(name)], kept)
        queries = Vectors([subject.features("val", reading[token]).blocks() for token in _tokens(name)])
        similarity, index = nearest(queries, bank, max(recipe.neighbors), device=subject.effort.device)
        for k in recipe.neighbors:
            for temperature in recipe.temperature:
                votes = vote(similarity[:, :k], train_labels[kept][index[:, :k]], temperature, classes)
                label = f"top1_k{k}" + (f"_{name}" if len(recipe.vector) > 1 else "")
                label += f"_t{temperature:g}" if len(recipe.temperature) > 1 else ""
                metrics[label], predicted[label] = accuracy(votes == val_labels), votes
    chosen = next(iter(metrics)) if recipe.reported == "first" else max(metrics, key=lambda label: metrics[label].value)
    trained = subject.checkpoint.format not in ("random", "pixels")
    warnings = _near_chance(metrics[chosen].value, train_labels) if trained else ()
    return Scores({"top1": metrics[chosen], **metrics}, main="top1", predictions=predicted[chosen], warnings=warnings)


def _near_chance(top1: float, labels: IntArray) -> tuple[str, ...]:
    """Many a "bad" checkpoint was one whose weights did not load."""
    chance = 100 * float(np.bincount(labels).max()) / len(labels)
    if top1 >= min(2 * chance, (100 + chance) / 2):
        return ()
    return (f"k-NN is near chance ({chance:.1f} %); does `ssl-bench inspect` show the network that you mean?",)


def _tokens(name: Vector) -> list[Token]:
    tokens: dict[Vector, list[Token]] = {"cls": ["cls"], "patch_mean": ["patch_mean"]}
    return tokens.get(name, ["cls", "patch_mean"])


def bank_rows(labels: IntArray, percent: float, seed: int) -> IntArray:
    """Rows of the bank: all, or a seeded share of every class (at least one image), in the order of the data."""
    if percent == 100:
        return np.arange(len(labels))
    shuffled = np.random.RandomState(seed).permutation(len(labels))  # RandomState: its streams never change
    kept = [
        rows[: max(1, round(len(rows) * percent / 100))]
        for c in np.unique(labels)
        for rows in [shuffled[labels[shuffled] == c]]
    ]
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True, eq=False)
class _Found:
    """The answer while it grows: cosines in float64, falling, and positions in the bank. (n, k) each"""

    similarity: Tensor
    index: Tensor


def nearest(
    queries: Vectors, bank: Vectors, k: int, *, device: str = "cpu", memory_bytes: int = 400 * 2**20
) -> tuple[Tensor, IntArray]:
    """The k most similar bank rows of every query: cosines in float64, falling, and positions in the bank. (n, k)"""
    found = _Found(torch.empty(len(queries), k, dtype=torch.float64), torch.empty(len(queries), k, dtype=torch.int64))
    open_queries = np.arange(len(queries))  # whose neighbors are not yet certain
    quick = [torch.bfloat16] if cpu_has_bf16() or device.startswith("cuda") else []
    for dtype in [*quick, torch.float32]:
        open_queries = _settle(
            queries, bank, open_queries, found, dtype=dtype, device=device, memory_bytes=memory_bytes
        )
    for query in open_queries:
        unit = queries.unit(np.array([query]), torch.float64)[0]
        found.similarity[query], found.index[query] = _whole_row(unit, bank, k)
    return found.similarity, found.index.numpy()


def _settle(
    queries: Vectors,
    bank: Vectors,
    waiting: IntArray,
    found: _Found,
    *,
    dtype: torch.dtype,
    device: str,
    memory_bytes: int,
) -> IntArray:
    """Find neighbors with arithmetic of `dtype`; returns the queries for which it was not precise enough."""
    k, coarse = found.index.shape[1], dtype == torch.bfloat16
    spare = min(k + (16 + k // 2 if coarse else 4 + k // 10), len(bank))
    # Of the memory an eighth for queries, a quarter for the bank's block, half for the similarities between them.
    rows = max(64, memory_bytes // 8 // (4 * queries.dim + 16 * spare))
    open_queries, at = [], 0
    while at < len(waiting):
        probing = coarse and at == 0
        chosen = waiting[at : at + (min(256, rows) if probing else rows)]
        best, where, slack = _candidates(
            queries, bank, chosen, spare, dtype=dtype, device=device, memory_bytes=memory_bytes
        )
        sure = torch.empty(len(chosen), dtype=torch.bool)
        for start in range(0, len(chosen), 128):  # few at a time: the candidates of one query are many vectors
            part = slice(start, start + 128)
            left = queries.unit(chosen[part], torch.float64)
            value, index = _refined(left, bank, where[part], k)
            found.similarity[chosen[part]], found.index[chosen[part]] = value, index
            # What is no candidate is no better than the worst candidate, within the slack of the arithmetic.
            sure[part] = (value[:, -1] > best[part][:, -1].double() + slack[part]) | (spare == len(bank))
        open_queries.append(chosen[~sure.numpy()])
        at += len(chosen)
        if probing and sure.float().mean() < 0.5:  # similarities too close to each other for bf16: do not insist
            break
    return np.concatenate([*open_queries, waiting[at:]])


def _candidates(
    queries: Vectors, bank: Vectors, chosen: IntArray, spare: int, *, dtype: torch.dtype, device: str, memory_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `spare` best by similarities in `dtype`, streaming the bank past the queries, and how wrong those may be.

    Of unit vectors q and b rounded to q' and b', |q'b' - qb| <= |q - q'| + |q'| |b - b'| (Cauchy-Schwarz). On top come
    the sum of D products in float32, in whatever order, and the rounding of the result.
    """
    block = max(64, min(len(bank), memory_bytes // 4 // (4 * bank.dim)))
    tile = max(1, min(len(chosen), memory_bytes // 2 // (4 * block)))
    left, left_error = _rounded(queries.unit(chosen, torch.float32).to(device), dtype)
    best = torch.full((len(chosen), spare), -torch.inf, device=device)
    where = torch.zeros((len(chosen), spare), dtype=torch.int64, device=device)
    space = torch.empty(tile * block, dtype=dtype, device=device)
    worst_error = 0.0
    for start in range(0, len(bank), block):
        right, error = _rounded(
            bank.unit(np.arange(start, min(start + block, len(bank))), torch.float32).to(device), dtype
        )
        worst_error = max(worst_error, float(error.max()))
        for at in range(0, len(chosen), tile):
            part = left[at : at + tile]
            similarity = torch.mm(part, right.T, out=space[: len(part) * len(right)].view(len(part), len(right)))
            value, index = _top(similarity, spare)
            value = torch.cat([best[at : at + tile], value], 1)
            index = torch.cat([where[at : at + tile], index + start], 1)
            best[at : at + tile], order = value.topk(spare, dim=1)
            where[at : at + tile] = index.gather(1, order)
    rounding = 2.0**-24 * (2 * bank.dim + 16) + (1.02 * 2.0**-9 if dtype == torch.bfloat16 else 0.0)
    return best.cpu(), where.cpu(), left_error.cpu() + 1.01 * worst_error + rounding


def _rounded(unit: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The vectors in `dtype`, and the length of each one's rounding error (n,)."""
    rounded = unit.to(dtype)
    return rounded, (unit - rounded).norm(dim=1).double()


_GROUP = 64


def _top(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk`, several times as fast on long rows: the largest values lie in the groups with the largest maxima."""
    rows, columns = similarity.shape
    whole = columns // _GROUP
    if columns < 4 * _GROUP * count:
        value, index = similarity.float().topk(min(count, columns), dim=1)
        return value, index
    groups = similarity[:, : whole * _GROUP].view(rows, whole, _GROUP)
    chosen = groups.amax(2).float().topk(count, dim=1).indices  # (n, count)
    index = (chosen[:, :, None] * _GROUP + torch.arange(_GROUP, device=chosen.device)).flatten(1)
    rest = torch.arange(whole * _GROUP, columns, device=chosen.device).expand(rows, -1)
    index = torch.cat([index, rest], 1)
    value, place = similarity.gather(1, index).float().topk(count, dim=1)
    return value, index.gather(1, place)


def _refined(left: Tensor, bank: Vectors, where: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates of each query by float64 similarity. (q, k) each"""
    candidates = bank.raw(where.flatten().numpy()).double().view(*where.shape, bank.dim)
    exact = torch.bmm(candidates, left[:, :, None])[:, :, 0].div_(bank.lengths[where])
    return _first(exact, where, k)


def _whole_row(query: Tensor, bank: Vectors, k: int) -> tuple[Tensor, Tensor]:
    """One query against the whole bank in float64: for ties and near-ties beyond the candidates."""
    blocks = (np.arange(start, min(start + 8192, len(bank))) for start in range(0, len(bank), 8192))
    exact = torch.cat([bank.raw(rows).double().mv(query) for rows in blocks]).div_(bank.lengths)
    similarity, index = _first(exact[None], torch.arange(len(bank))[None], k)
    return similarity[0], index[0]


def _first(similarity: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row; equal ones in the order of the bank."""
    by_index = index.argsort(dim=1)
    similarity, index = similarity.gather(1, by_index), index.gather(1, by_index)
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarity.gather(1, order), index.gather(1, order)


def vote(similarity: Tensor, labels: IntArray, temperature: float, classes: int) -> IntArray:
    """The class with the largest sum of exp(similarity / temperature) over the neighbors. (n,)"""
    winners = []
    for start in range(0, len(labels), 4096):
        part = slice(start, start + 4096)
        # Relative to the nearest neighbor: the same winner, and no overflow at low temperatures.
        weights = ((similarity[part] - similarity[part, :1]) / temperature).exp()
        sums = torch.zeros(len(weights), classes, dtype=torch.float64)
        sums.scatter_add_(1, torch.from_numpy(labels[part]), weights)
        winners.append(sums.numpy().argmax(1))  # numpy's argmax: the first class of a tie, by definition
    return np.concatenate(winners)
