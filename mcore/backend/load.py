"""Weights of a `torch_dist` checkpoint into a live model: all of them, or an error that lists what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.backend.meta import ShardedShape
from mcore.bridge.dist_dialects import EMBEDDING, read_weights, respell
from mcore.bridge.dist_files import DistTensor, read_dist_tensors
from mcore.bridge.finite import is_finite
from mcore.errors import CheckpointError, Problem
from mcore.progress import say

T = TypeVar("T", str, tuple[str, str], tuple[str, tuple[int, ...], str])


def load_weights(model: GPTModel | Sequence[GPTModel], iteration_dir: Path) -> None:
    """Fill a model with the weights of a checkpoint, whatever wrote it and from whatever layout; all ranks call it.

    Each rank reads its own parts only. Tensors are cast to the model's dtype where the checkpoint's differs.
    `_extra_state` objects are left alone: they hold FP8 scales, which no checkpoint that weights are taken from has.

    Args:
        model: From `mcore.backend.model.build_model`; all of this rank's, with virtual pipeline stages.
        iteration_dir: Folder with `.metadata` and the shards.

    Raises:
        CheckpointError: The folder is not complete; or weights are missing, unexpected, misshapen, no floating-point
            numbers, not finite, or too large for the model's dtype. Names all of them, the same on every rank.
        WeightPlanError: Weights that lie in several parts are not whole (`mcore.bridge.dist_dialects.read_weights`).
    """
    models = [model] if isinstance(model, torch.nn.Module) else list(model)
    tensors = [tensor for stage in models for tensor in model_tensors(stage)]
    wanted = over_all_ranks(tensors)
    saved = read_weights(iteration_dir, {key: tensor.shape for key, tensor in wanted.items()})
    if problems := _differences(wanted, saved):
        raise CheckpointError(f"{iteration_dir} does not hold this model", problems)
    say_what_is_lost(tensors, {key: getattr(torch, tensor.dtype) for key, tensor in saved.items()})
    too_large = []
    with torch.no_grad():
        for tensor in tensors:
            part = saved[tensor.key].read_box(tensor.global_offset, stacked_sizes(tensor))
            tensor.data.copy_(part.reshape(tensor.local_shape))
            if overflows(part, tensor.data):
                stacked = list(tensor.global_offset[: tensor.prepend_axis_num])
                name = f"{tensor.key}, number {', '.join(map(str, stacked))}" if stacked else tensor.key
                too_large.append((name, str(tensor.dtype).removeprefix("torch.")))
    refuse_overflow(too_large, iteration_dir)
    refuse_not_finite(models, iteration_dir)


def padded_vocab_size(iteration_dir: Path) -> int:
    """Rows of the embedding in a checkpoint.

    Raises:
        CheckpointError: The folder is not complete or holds no embedding.
    """
    tensors, _ = respell(read_dist_tensors(iteration_dir), {})
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{iteration_dir} holds no language model", [Problem(EMBEDDING, "a tensor", "none")])
    return tensors[EMBEDDING].shape[0]


def model_tensors(model: GPTModel) -> list[ShardedTensor]:
    """This rank's parts of all weights, as views of the parameters: what is written into them is in the model."""
    state = model.sharded_state_dict()
    apply_factories(state)  # a parameter that is saved in parts, such as gate and up of a gated MLP, becomes the parts
    return [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]


def stacked_sizes(tensor: ShardedTensor) -> tuple[int, ...]:
    """Shape of a rank's part with the axes that megatron stacks layers and experts on."""
    return (*(1,) * tensor.prepend_axis_num, *tensor.local_shape)


def over_all_ranks(tensors: Iterable[ShardedTensor]) -> dict[str, ShardedShape]:
    """Global shapes and dtypes by key, over all ranks."""
    own = [(tensor.key, tuple(tensor.global_shape), str(tensor.dtype)) for tensor in tensors]
    return {key: ShardedShape(shape, getattr(torch, dtype.removeprefix("torch."))) for key, shape, dtype in _union(own)}


def overflows(stored: Tensor, held: Tensor) -> bool:
    """Whether finite numbers became infinite when they were cast to the dtype of `held`."""
    if torch.finfo(stored.dtype).max <= torch.finfo(held.dtype).max:
        return False
    return not is_finite(held) and is_finite(stored)


def refuse_overflow(too_large: Iterable[tuple[str, str]], source: Path) -> None:
    """Check what was cast; all ranks call it.

    Args:
        too_large: This rank's tensors that `overflows` tells of, each with its dtype in the model.
        source: Where they come from.

    Raises:
        CheckpointError: There are some on any rank; the same on every rank.
    """
    problems = [
        Problem(
            name, f"numbers up to {torch.finfo(getattr(torch, dtype)).max:g}, the largest of {dtype}", "larger ones"
        )
        for name, dtype in _union(list(too_large))
    ]
    if problems:
        raise CheckpointError(f"{source} holds weights that are too large for the model's dtype", problems)


def refuse_not_finite(models: Sequence[torch.nn.Module], source: Path) -> None:
    """Check what was loaded; all ranks call it.

    Raises:
        CheckpointError: Something is NaN or infinite; the same on every rank.
    """
    everything = [named for model in models for named in (*model.named_parameters(), *model.named_buffers())]
    wrong = [name for name, tensor in everything if tensor.is_floating_point() and not is_finite(tensor)]
    if problems := [Problem(name, "finite numbers", "NaN or infinity") for name in _union(wrong)]:
        raise CheckpointError(f"{source} holds weights that are no finite numbers", problems)


def say_what_is_lost(tensors: Iterable[ShardedTensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Say which dtypes of the files, by key, the model rounds."""
    casts = {(dtypes[tensor.key], tensor.dtype) for tensor in tensors}
    for of_file, of_model in sorted(casts, key=str):
        if torch.promote_types(of_file, of_model) != of_model and dist.get_rank() == 0:
            say(f"weights are rounded from {of_file} to {of_model}".replace("torch.", ""))


def _union(items: list[T]) -> list[T]:
    gathered: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return sorted({item for of_rank in gathered for item in of_rank})


def _differences(wanted: Mapping[str, ShardedShape], saved: Mapping[str, DistTensor]) -> list[Problem]:
    problems = [Problem(key, "a tensor in the checkpoint", "none") for key in wanted if key not in saved]
    for key, tensor in saved.items():
        if key not in wanted:
            problems.append(Problem(key, "no such tensor in the checkpoint", f"one of {tensor.shape}"))
        elif tensor.shape != wanted[key].shape:
            problems.append(Problem(key, f"shape {wanted[key].shape}", f"{tensor.shape}"))
        elif not getattr(torch, tensor.dtype).is_floating_point:
            problems.append(Problem(key, "floating-point numbers", tensor.dtype))
    return problems
