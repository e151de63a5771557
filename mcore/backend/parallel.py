"""Process groups: torch.distributed and megatron-core's parallel state, on GPUs (NCCL) or a CPU (gloo)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore.backend.cpu import install_cpu_backend
from mcore.backend.layout import Layout
from mcore.errors import ConfigError, PipelineError

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 1800.0
"""Seconds that a collective may wait for the slowest process before it fails."""


def start(layout: Layout, *, seed: int = 1234, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Join the process groups of a run; may be called again with another layout.

    Under torchrun its environment says who the other processes are. Without it this process is alone, and nothing
    listens on a port.

    Args:
        layout: How the model is divided. Processes beyond one copy of the model hold further copies (data parallel).
        seed: Seed of Python's, numpy's and torch's generators; pipeline stages get different ones.
        timeout_s: Seconds that a collective may take.

    Raises:
        ConfigError: The number of processes is no multiple of what one copy of the model, or of its experts, takes.
    """
    install_cpu_backend()
    if problems := layout.process_problems(int(os.environ.get("WORLD_SIZE", "1"))):
        raise ConfigError("the layout does not fit", problems)
    if not dist.is_initialized():
        _join(timedelta(seconds=timeout_s))

    from megatron.core import parallel_state

    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    set_seed(seed)


def _leave_groups() -> None:
    """Leave the groups of an earlier layout. megatron-core only forgets them, and each gloo group keeps its threads."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def stop() -> None:
    """Leave the process groups. Does nothing if there are none."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def parallel_processes(
    layout: Layout, *, seed: int = 1234, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[torch.device]:
    """`start` and, behind the block, `stop`. Yields the device to put inputs on."""
    start(layout, seed=seed, timeout_s=timeout_s)
    try:
        yield device()
    finally:
        stop()


def on_rank_0(work: Callable[[], T]) -> T:
    """Run something on rank 0 alone; all ranks get what it returns, or raise what it raised."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except PipelineError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def set_seed(seed: int) -> None:
    """Seed every generator. Megatron's rule: the same on all tensor and data parallel ranks of a stage.

    Inside tensor parallel regions megatron-core's tracker gives each TP rank a seed of its own.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. A GPU's is not waited for; a plain copy would wait for all the work the GPU has got."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _join(timeout: timedelta) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        # gloo would look up the host's name, which needs no entry anywhere if all processes are on this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
