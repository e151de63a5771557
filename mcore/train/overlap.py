"""Communication of data parallel processes beside computation: gradients in the backward pass, weights in the forward.

megatron-core's wrapper sums a bucket's gradients as soon as all of them are there. It has to be told which micro-batch
is a step's last: without that it counts what came in the first step, and in a step of more micro-batches it sums too
early and loses the rest (gloo writes back what it had when it began).

Weights of a bucket are gathered when the bucket in front of it is used, and a module waits for its own before it runs.
So between a step's update and the next forward pass a process has its own share of the new weights only: what reads
them elsewhere (validation, checkpoints) has to ask for all of them first.

Source: megatron-core 0.16.1, `distributed/`; Megatron-LM (core 0.16) `training/training.py` for when hooks are on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor
from torch.nn import Module, Parameter

NEVER_CALLED = "lora"
"""Child whose parameters the module above it uses in a hook of its own, so that no hook of the child's ever runs."""


class OverlappingDataParallel(DistributedDataParallel):  # type: ignore[misc]
    """megatron-core's wrapper, whose modules also wait for the weights of adapters on them."""

    def scale_gradients(self, scaling_factor: Tensor) -> None:
        """As the wrapper's own, by a kernel of six times the speed: a number on the device slows a plain product."""
        buffers = [*self.buffers, *self.expert_parallel_buffers]
        torch._foreach_mul_([buffer.grad_data for buffer in buffers], scaling_factor)

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        def wait_for_weights(module: Module, *inputs: Any) -> None:
            for parameter in _read_by(module):
                if (group := self.param_to_bucket_group.get(parameter)) is not None:
                    group.finish_param_sync()

        return wait_for_weights

    def finish_gathering(self) -> None:
        """Wait for weights that no module has waited for in a forward pass, in the order in which others were gathered.

        So all processes have gathered the same buckets behind it, whatever their samples made them use.
        """
        if not self.remove_forward_pre_hook_handles:
            return
        for groups in (self.bucket_groups, self.expert_parallel_bucket_groups):
            for group in reversed(groups):
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def _read_by(module: Module) -> Iterator[Parameter]:
    yield from module.parameters(recurse=False)
    never_called = getattr(module, NEVER_CALLED, None)
    if isinstance(never_called, Module):
        yield from never_called.parameters()


def overlap(modules: Sequence[Module], chunks: Sequence[OverlappingDataParallel]) -> None:
    """Have megatron-core's schedules begin the sums of gradients when a step's last micro-batch is there.

    Args:
        modules: megatron-core's bare models; the first one's config is what schedules read.
        chunks: The same, wrapped.
    """
    several = len(chunks) > 1
    no_sync, begin = [chunk.no_sync for chunk in chunks], [chunk.start_grad_sync for chunk in chunks]
    for module in modules:
        config: Any = module.config
        config.no_sync_func = no_sync if several else no_sync[0]
        # All pipeline stages at once, so that none of them keeps the others waiting for activations.
        config.grad_sync_func = begin if several else begin[0]
        config.finalize_model_grads_func = _finalize


def _finalize(model: list[OverlappingDataParallel], *args: Any, **kwargs: Any) -> None:
    for chunk in model:
        chunk.finish_gathering()
    finalize_model_grads(model, *args, **kwargs)


class Gathering:
    """Whether weights are gathered beside the forward pass, on this rank. They are not until the first step is done.

    So what a rank has loaded wrongly does not spread to the others unseen.

    Args:
        chunks: The wrapped model; one whose weights are never gathered beside anything is left alone.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = [chunk for chunk in chunks if chunk.use_forward_hook]
        self._is_on = False
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=False)

    def begin(self) -> None:
        """To be called behind each update of the weights."""
        if self._chunks and not self._is_on:
            self._enable()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all weights on all ranks inside the block, which may read or replace them; all ranks enter it."""
        if not self._is_on:
            yield
            return
        with torch.no_grad():
            for chunk in self._chunks:
                chunk.disable_forward_pre_hook()
        self._is_on = False
        try:
            yield
        finally:
            self._enable()

    def _enable(self) -> None:
        for chunk in self._chunks:
            chunk.enable_forward_pre_hook()
        self._is_on = True
