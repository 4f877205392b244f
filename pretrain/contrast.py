"""InfoNCE over the global batch, for methods that tell images or patches apart.

Between patches (MMC, Eq. 2) it is computed in bounded memory: every one of B * P queries meets all patches of all other
images, for 48 images of 196 patches on 8 processes 9,408 by 75,264 similarities, 2.8 GB in float32, several times over
with their gradients. Since the keys are a teacher's and carry no gradient, the gradient of the queries is known as soon
as a few images' similarities are, so both are computed together, some images at a time, and no similarity is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_bench.evaluate.training.distributed import gathered_from_all, rank

# Similarities at a time. On a processor they should fit its cache, on an accelerator keep it busy.
CHUNK_ON_CPU, CHUNK = 2**20, 2**27


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Mean over queries of -log exp(q.k+ / T) / sum_k exp(q.k / T), on unit vectors; both (B, D), row i with row i.

    Keys are a teacher's: they carry no gradient, and are gathered from all processes. Returns a scalar in float32.
    """
    queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.detach().float(), dim=-1)
    everyone = gathered_from_all(keys)
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ everyone.T / temperature
    positives = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(logits, positives)


def patch_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Mean over queries of -log(e+ / (e+ + sum of e-)), e = exp(q.k / T) on unit vectors; both (B, P, C).

    e+: the key at the same place of the same image. e-: all keys of other images, of all processes; other patches of
    the same image are left out. Keys carry no gradient. Returns a scalar in float32.
    """
    everyone = F.normalize(gathered_from_all(keys.detach()).float(), dim=-1)
    loss: Tensor = _PatchInfoNCE.apply(F.normalize(queries.float(), dim=-1), everyone, temperature)
    return loss


class _PatchInfoNCE(torch.autograd.Function):
    """On unit vectors: queries (B, P, C), keys (N, P, C) of which rows rank * B ... are the queries' own images."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        batch, places = queries.shape[:2]
        first = rank() * batch
        positives = keys[first : first + batch]
        flat = keys.flatten(0, 1)
        gradient, total = torch.empty_like(queries), queries.new_zeros(())
        images = max(1, (CHUNK if queries.is_cuda else CHUNK_ON_CPU) // (places * len(flat)))
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, batch, images):
                part = slice(start, start + images)
                # Unit vectors: no similarity exceeds 1, so exp((q.k - 1) / T) cannot overflow and needs no maximum.
                own = (queries[part] * positives[part]).sum(-1, keepdim=True).sub_(1).div_(temperature)  # (b, P, 1)
                scaled = queries[part].flatten(0, 1) / temperature
                others = (scaled @ flat.T).sub_(1 / temperature).exp_().view(-1, places, len(flat))  # (b, P, N * P)
                for image in range(len(others)):
                    at = (first + start + image) * places
                    others[image, :, at : at + places] = 0
                e = own.exp()
                z = others.sum(-1, keepdim=True).add_(e)
                total += (z.log() - own).sum()
                # d/dq: the mean of all keys with weights e / z, less the positive key; over T.
                mean = others @ flat
                gradient[part] = (mean + (e - z) * positives[part]) / z
        ctx.save_for_backward(gradient.div_(temperature * batch * places))
        return total / (batch * places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_outputs[0], None, None
