"""Several processes under torchrun: who am I, and sums and lists over all. One process needs none of it."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_bench.errors import UserError


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def device() -> torch.device:
    """Where tensors must lie to be exchanged between processes: nccl knows the GPU only."""
    if world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def mean_of_all(x: Tensor) -> Tensor:
    """The mean over processes, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def sum_of_all(x: Tensor) -> Tensor:
    """The sum over processes, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gathered_from_all(x: Tensor) -> Tensor:
    """(B, ...) of every process, in the order of their ranks: (world * B, ...); no gradient, the same B everywhere."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def union(numbers: Iterable[int]) -> set[int]:
    """All that any process has."""
    everywhere: list[set[int]] = [set(numbers)]
    if world_size() > 1:
        everywhere *= world_size()
        dist.all_gather_object(everywhere, set(numbers))
    return set().union(*everywhere)


def gathered_objects(items: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other in the order of their ranks."""
    everywhere = [items]
    if world_size() > 1:
        everywhere *= world_size()
        dist.all_gather_object(everywhere, items)
    return [item for part in everywhere for item in part]


def refuse_together(error: UserError | None) -> None:
    """If any process has an error, all raise it: one that goes on alone would wait for the others for ever."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    if float(sum_of_all(torch.tensor([float(error is not None)], device=device()))):
        everywhere = gathered_objects([error] if error is not None else [])
        raise everywhere[0]


def from_first(x: Tensor) -> Tensor:
    """The tensor of process 0, in place."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def on_first(action: Callable[[], None]) -> None:
    """Let process 0 do something that concerns all; the others wait, and are refused what it is refused."""
    said: list[str | None] = [None]
    if rank() == 0:
        try:
            action()
        except UserError as error:
            if world_size() == 1:
                raise
            said[0] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise UserError(said[0])


def replicated(module: nn.Module) -> DistributedDataParallel:
    """The module with its gradients averaged over processes. Its buffers (queues, running means) are its own affair."""
    return DistributedDataParallel(module, **own_buffers())


def own_buffers() -> dict[str, Any]:
    """The option that leaves a module's buffers to itself; torch renamed it on the way from 2.11 to 2.15."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


@contextlib.contextmanager
def together(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did: nccl on CUDA, gloo elsewhere. Yields this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    cuda = device.startswith("cuda")
    # Long: the others wait while process 0 saves, or monitors on a whole validation set.
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(hours=24), device_id=torch.device(device) if cuda else None
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
