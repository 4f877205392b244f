"""mmengine's Runner without its noise: nothing on the console, no files of its own, nothing global left changed."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
import types
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn

from ssl_bench.evaluate.training import distributed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What mm packages print and warn of is dropped, and what they change of the process is put back."""
    python, numpy, threads = random.getstate(), np.random.get_state(), cv2.getNumThreads()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    singletons = {kind: dict(kind._instance_dict) for kind in (MMLogger, MessageHub, DefaultScope)}
    try:
        with (
            torch.random.fork_rng(devices=[]),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            _silent_logger("ssl-bench")  # mm's functions log to the newest one, or make one that prints
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        cv2.setNumThreads(threads)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for kind, before in singletons.items():  # mm's global objects would live for ever
            kind._instance_dict.clear()
            kind._instance_dict.update(before)


def _silent_logger(name: str) -> MMLogger:
    logger = MMLogger.get_instance(name, logger_name=name, log_level="CRITICAL")
    logger.handlers[:] = [logging.NullHandler()]
    return logger


class QuietRunner(Runner):
    """Lives within `quiet()`."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.device = torch.device(device)
        launcher = "pytorch" if distributed.world_size() > 1 else "none"
        nothing = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"))
        # It wants to make a folder, and then has nothing to put there: one that exists will do.
        super().__init__(
            network, tempfile.gettempdir(), launcher=launcher, default_hooks=nothing, experiment_name=uuid.uuid4().hex
        )

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """The processes have joined already; nothing else is to be set."""
        self._rank, self._world_size, self._timestamp = distributed.rank(), distributed.world_size(), ""

    def set_randomness(self, **kwargs: Any) -> None:
        """Every step is seeded for itself."""
        self._seed, self._deterministic = 0, False

    def build_logger(self, **kwargs: Any) -> MMLogger:
        """One that says nothing."""
        return _silent_logger(self._experiment_name)

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """None; loops tell it the names of the classes."""
        return types.SimpleNamespace(dataset_meta=None)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """On the device that the user chose, with gradients averaged over processes."""
        model = model.to(self.device)
        if not self.distributed or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        wrapped: nn.Module = MMDistributedDataParallel(model, **distributed.own_buffers())
        return wrapped

    def _init_model_weights(self) -> None:
        """`build` did."""

    def load_or_resume(self) -> None:
        """`train` did."""

    def dump_config(self) -> None:
        """The config stands beside the record."""

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """The record has the environment."""
