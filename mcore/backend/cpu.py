"""megatron-core on a machine without CUDA: each function here bridges one thing it expects of a GPU.

Nothing changes where CUDA is available. What is bridged is what training, checkpoints and inference of dense models
and of mixtures of experts use; a call that isn't bridged fails loudly inside torch ("Torch not compiled with CUDA
enabled").
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_installed: ExitStack | None = None


def install_cpu_backend() -> None:
    """Bridge megatron-core's CUDA calls for the rest of this process. Does nothing if done already or CUDA is there."""
    global _installed
    if _installed is None and not torch.cuda.is_available():
        _installed = ExitStack()
        _enter_bridges(_installed)


@contextlib.contextmanager
def cpu_backend() -> Iterator[None]:
    """Bridge megatron-core's CUDA calls inside the block only, and put everything back behind it."""
    with ExitStack() as stack:
        if _installed is None and not torch.cuda.is_available():
            _enter_bridges(stack)
        yield


def _enter_bridges(stack: ExitStack) -> None:
    bridges = (
        current_device_is_cpu,
        no_device_queue,
        no_streams,
        one_generator,
        no_false_rng_warning,
        sizes_for_gloo,
        CudaMeansCpu,
    )
    for bridge in bridges:
        stack.enter_context(bridge())


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def current_device_is_cpu() -> AbstractContextManager[None]:
    """Layers, buffers and p2p receive tensors are allocated on `torch.cuda.current_device()`."""
    return _replaced(torch.cuda, current_device=lambda: CPU, set_device=lambda device: None)


def no_device_queue() -> AbstractContextManager[None]:
    """CPU work is done when a call returns: there is nothing to wait for, and no cache of the allocator to empty."""
    return _replaced(torch.cuda, synchronize=lambda device=None: None, empty_cache=lambda: None)


class NoStream:
    """Stands for a stream and for an event: there is one order of things, and nothing to wait for."""

    def wait_stream(self, stream: NoStream) -> None:
        """Work of the other stream is done."""

    def record_event(self) -> NoStream:
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """All work is done."""


@contextlib.contextmanager
def no_streams() -> Iterator[None]:
    """The token dispatcher of expert parallelism counts tokens on a stream of its own, which it keeps for good."""
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher").MoEAlltoAllTokenDispatcher
    stream = NoStream()
    with (
        _replaced(dispatcher, cuda_dtoh_stream=stream),
        _replaced(torch.cuda, current_stream=lambda device=None: stream, stream=lambda it: contextlib.nullcontext()),
    ):
        yield


@contextlib.contextmanager
def one_generator() -> Iterator[None]:
    """The RNG tracker and activation recompute save and restore the GPU's generator: here that is the CPU's."""
    # Its own module keeps private copies of torch's getter and setter, which reach for CUDA's generators directly.
    tracker = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    public = {"get_rng_state": get_state, "set_rng_state": set_state, "manual_seed": torch.manual_seed}
    with (
        _replaced(torch.cuda, **public),
        _replaced(torch.cuda.random, **public),
        _replaced(tracker, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state),
    ):
        yield


@contextlib.contextmanager
def no_false_rng_warning() -> Iterator[None]:
    """The RNG tracker warns when the CPU's generator moves while a GPU's should. Here they are one and the same."""

    def keep(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.msg

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def sizes_for_gloo() -> Iterator[None]:
    """Expert parallelism exchanges parts of unequal size, and names the sizes by tensors; gloo takes neither.

    The functions themselves are replaced, as the backward pass calls them where no function mode reaches.
    """
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def all_to_all_single(*args: Any, **kwargs: Any) -> Any:
        sizes = {key: value.tolist() for key, value in kwargs.items() if key.endswith("_split_sizes") and _is_1d(value)}
        return exchange(*args, **(kwargs | sizes))

    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        num_rows = [part.shape[0] for part in tensor_list if part.dim()]
        if len(set(num_rows)) < 2:
            return gather(tensor_list, tensor, group, async_op)
        padded = tensor.new_zeros((max(num_rows), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in tensor_list]
        assert not async_op, "parts of unequal size are gathered at once"
        gather(parts, padded, group)
        for to, part in zip(tensor_list, parts, strict=True):
            to.copy_(part[: to.shape[0]])
        return None

    with _replaced(dist, all_to_all_single=all_to_all_single, all_gather=all_gather):
        yield


def _is_1d(sizes: Any) -> bool:
    return isinstance(sizes, Tensor) and sizes.dim() == 1


class CudaMeansCpu(TorchFunctionMode):
    """Optimizer and schedules ask for "cuda" by name: `device="cuda"`, `.cuda()`, `.to("cuda")`, `.type()`.

    Torch switches function modes off inside a backward pass, so only what runs in forward, optimizer and checkpoints
    can be bridged here. Backward takes its devices from `current_device`.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one torch call with the device put right."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer sorts parameters by names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = kwargs | {"device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}  # for copies to a device, which there is none of
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return device is not None and (isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda")
