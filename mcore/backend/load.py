"""Weights of a `torch_dist` checkpoint into a live model: all of them, or an error that lists what differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel

from mcore.errors import CheckpointError, Problem
from mcore.progress import say
from mcore.select import completeness_problems

T = TypeVar("T", str, tuple[str, tuple[int, ...]])
EMBEDDING = "embedding.word_embeddings.weight"
TRAINING_STATE = ("optimizer.", "chained_")
"""Beginnings of the keys of tensors that a training checkpoint holds beside the model's (the rest of its state, such as
generators, are no tensors)."""


def load_weights(model: GPTModel, iteration_dir: Path) -> None:
    """Fill a model with the weights of a checkpoint, whatever layout it was saved from; all ranks call it.

    Tensors are cast to the model's dtype where the checkpoint's differs. `_extra_state` objects are left alone: they
    hold FP8 scales, which no checkpoint that weights are taken from has.

    Args:
        model: From `mcore.backend.model.build_model`.
        iteration_dir: Folder with `.metadata` and the shards.

    Raises:
        CheckpointError: The folder is not complete; or weights are missing, unexpected, misshapen, no floating-point
            numbers, or NaN. Names all of them, the same on every rank.
    """
    saved = saved_tensors(iteration_dir)
    wanted = _model_tensors(model)
    problems = _differences(_over_all_ranks(wanted), saved)
    if problems:
        raise CheckpointError(f"{iteration_dir} does not hold this model", problems)
    _say_what_is_lost(wanted, saved)
    # Megatron sorts by each entry's own key, so the names here are free. Loading writes into the parameters themselves.
    dist_checkpointing.load({str(number): tensor for number, tensor in enumerate(wanted)}, str(iteration_dir))
    nan = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if problems := [Problem(name, "numbers", "NaN") for name in _union(nan)]:
        raise CheckpointError(f"{iteration_dir} holds weights that are no numbers", problems)


def saved_tensors(iteration_dir: Path) -> Mapping[str, ShardedTensor]:
    """Key, global shape and dtype of every tensor in a checkpoint, training state included. Reads no tensor.

    Raises:
        CheckpointError: The folder is not complete.
    """
    problems = completeness_problems(iteration_dir)
    if problems:
        raise CheckpointError(f"{iteration_dir} is not complete", problems)
    tensors: Mapping[str, ShardedTensor] = dist_checkpointing.load_tensors_metadata(str(iteration_dir))
    return tensors


def padded_vocab_size(iteration_dir: Path) -> int:
    """Rows of the embedding in a checkpoint.

    Raises:
        CheckpointError: The folder is not complete or holds no embedding.
    """
    tensors = saved_tensors(iteration_dir)
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{iteration_dir} holds no language model", [Problem(EMBEDDING, "a tensor", "none")])
    return int(tensors[EMBEDDING].global_shape[0])


def _model_tensors(model: GPTModel) -> list[ShardedTensor]:
    state = model.sharded_state_dict()
    apply_factories(state)  # a parameter that is saved in parts, such as gate and up of a gated MLP, becomes the parts
    return [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]


def _over_all_ranks(tensors: list[ShardedTensor]) -> dict[str, tuple[int, ...]]:
    """Global shapes by key over all pipeline stages."""
    return dict(_union([(tensor.key, tuple(tensor.global_shape)) for tensor in tensors]))


def _union(items: list[T]) -> list[T]:
    gathered: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return sorted({item for of_rank in gathered for item in of_rank})


def _differences(wanted: Mapping[str, tuple[int, ...]], saved: Mapping[str, ShardedTensor]) -> list[Problem]:
    problems = [Problem(key, "a tensor in the checkpoint", "none") for key in wanted if key not in saved]
    for key, tensor in saved.items():
        shape = tuple(tensor.global_shape)
        if key not in wanted:
            if not key.startswith(TRAINING_STATE):
                problems.append(Problem(key, "no such tensor in the checkpoint", f"one of {shape}"))
        elif shape != wanted[key]:
            problems.append(Problem(key, f"shape {wanted[key]}", f"{shape}"))
        elif not tensor.dtype.is_floating_point:
            problems.append(Problem(key, "floating-point numbers", str(tensor.dtype)))
    return problems


def _say_what_is_lost(wanted: list[ShardedTensor], saved: Mapping[str, ShardedTensor]) -> None:
    casts = {(saved[tensor.key].dtype, tensor.dtype) for tensor in wanted}
    for of_file, of_model in sorted(casts, key=str):
        if torch.promote_types(of_file, of_model) != of_model and dist.get_rank() == 0:
            say(f"weights are rounded from {of_file} to {of_model}".replace("torch.", ""))
