from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ssl_bench.pretrain import contrast
from ssl_bench.pretrain.contrast import info_nce, patch_info_nce
from ssl_bench.pretrain.mmc_heads import GlobalBatchNorm

T = 0.2


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain nothing from several, and lose much where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cosine(a, b):
    return (a * b).sum() / a.norm() / b.norm()


def slow_info_nce(queries, keys, temperature):
    """(B, C), (B, C), one pair at a time in float64."""
    total = 0.0
    for i in range(len(queries)):
        e = [(cosine(queries[i], keys[j]) / temperature).exp() for j in range(len(keys))]
        total = total - (e[i] / sum(e)).log()
    return total / len(queries)


def slow_patch_info_nce(queries, keys, temperature):
    """(B, P, C), (B, P, C): MMC's Eq. 2, averaged over images."""
    batch, places = queries.shape[:2]
    total = 0.0
    for i in range(batch):
        for p in range(places):
            positive = (cosine(queries[i, p], keys[i, p]) / temperature).exp()
            negatives = [
                (cosine(queries[i, p], keys[j, r]) / temperature).exp()
                for j in range(batch)
                if j != i
                for r in range(places)
            ]
            total = total - (positive / (positive + sum(negatives))).log()
    return total / (batch * places)


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return queries.requires_grad_(), 3 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5


CASES = [(info_nce, slow_info_nce, (6, 5)), (patch_info_nce, slow_patch_info_nce, (4, 3, 5))]


@pytest.mark.parametrize(("fast", "slow", "shape"), CASES)
@pytest.mark.parametrize("temperature", [0.025, 0.2, 1.0])
def test_loss_and_gradient_of_the_definition(fast, slow, shape, temperature):
    queries, keys = vectors(*shape)
    expected = slow(queries, keys, temperature)
    (slope,) = torch.autograd.grad(expected, queries)
    loss = fast(queries, keys.requires_grad_(), temperature)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()  # any factor, as gradient scaling has
    assert torch.allclose(queries.grad, 3 * slope, rtol=1e-4, atol=1e-6)
    assert keys.grad is None


@pytest.mark.parametrize("chunk", [1, 2 * 7 * 42, 10**6])
def test_patches_in_parts_give_what_they_give_together(monkeypatch, chunk):
    """One image at a time, two (with a rest of none), all six."""
    queries, keys = vectors(6, 7, 4)
    expected = slow_patch_info_nce(queries, keys, T)
    (slope,) = torch.autograd.grad(expected, queries)
    monkeypatch.setattr(contrast, "CHUNK_ON_CPU", chunk)
    loss = patch_info_nce(queries, keys, T)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(queries.grad, slope, rtol=1e-4, atol=1e-6)


def test_how_many_negatives_there_are():
    """With all keys equal the loss counts them: images for class tokens, patches of other images for patches."""
    queries, _ = vectors(5, 196, 8)
    keys = torch.ones(5, 196, 8)
    assert info_nce(queries[:, 0], keys[:, 0], T).item() == pytest.approx(math.log(5), rel=1e-5)
    assert patch_info_nce(queries, keys, T).item() == pytest.approx(math.log(1 + 4 * 196), rel=1e-5)


def test_other_patches_of_the_image_do_not_count():
    """Image 1's other keys move: its query at place 0 is pulled and pushed as before, those of other images are not."""
    queries, keys = vectors(3, 4, 6)
    moved = keys.clone()
    moved[1, 1:] = -moved[1, 1:]
    before, after = (torch.autograd.grad(patch_info_nce(queries, k, T), queries)[0] for k in (keys, moved))
    assert torch.allclose(after[1, 0], before[1, 0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(after[0, 0], before[0, 0], rtol=1e-2)


def test_a_perfect_match_at_the_lowest_temperature_is_0_and_the_worst_is_finite():
    queries = torch.eye(4).unsqueeze(1).requires_grad_()  # orthogonal images
    assert patch_info_nce(queries, torch.eye(4).unsqueeze(1), 0.025).item() == pytest.approx(0, abs=1e-6)
    worst = patch_info_nce(queries, -torch.eye(4).unsqueeze(1), 0.025)
    worst.backward()
    assert worst.item() == pytest.approx(40 + math.log(3 + math.exp(-40)), rel=1e-5)
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize(("fast", "slow", "shape"), CASES)
def test_autocast_does_not_reach_the_loss(fast, slow, shape):
    queries, keys = vectors(*shape)
    expected = slow(queries, keys, T).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(queries.float(), keys.float(), T)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


class Net(nn.Module):
    """Something whose gradient goes through batch statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(5, 6), GlobalBatchNorm(6)
        self.last = GlobalBatchNorm(6, affine=False)

    def forward(self, x):
        return self.last(self.norm(self.linear(x)).relu())


def work(images):
    """Losses and gradients of a batch or of a process's half of it."""
    net = Net()
    queries = net(images.flatten(0, 1)).view(len(images), 3, 6)
    keys = 2 * images[..., [0, 1, 2, 3, 4, 0]]
    losses = torch.stack([info_nce(queries[:, 0], keys[:, 0], T), patch_info_nce(queries, keys, T)])
    losses.sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    return losses.detach(), gradients, torch.cat([buffer.flatten().float() for buffer in net.norm.buffers()][:2])


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images = torch.load(f"{folder}/images.pt")[4 * rank : 4 * rank + 4]
    torch.save(work(images), f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path):
    images = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "images.pt")
    alone = work(images)
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    losses, gradients = ((results[0][part] + results[1][part]) / 2 for part in range(2))
    assert not torch.allclose(results[0][0], results[1][0])
    assert torch.allclose(losses, alone[0], rtol=1e-5)
    assert torch.allclose(gradients, alone[1], rtol=1e-4, atol=1e-6)
    assert torch.allclose(results[0][2], alone[2], rtol=1e-5)  # running statistics: torch's, the same in both
    assert torch.equal(results[0][2], results[1][2])


def test_batch_norm_in_one_process_is_torchs():
    ours, theirs = GlobalBatchNorm(6), nn.BatchNorm1d(6)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 2)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
