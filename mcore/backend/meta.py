"""What a checkpoint of a model holds: names, global shapes and dtypes, told without building the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from mcore.backend.cpu import no_streams
from mcore.backend.layout import Layout
from mcore.backend.model import build_model


@dataclass(frozen=True, slots=True)
class ShardedShape:
    """One tensor of a checkpoint: its global shape, and megatron's dtype for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class CheckpointContent:
    """Everything that `model.sharded_state_dict()` puts into a checkpoint, over all ranks."""

    tensors: Mapping[str, ShardedShape]
    """Tensors by key. Layers are stacked, and experts: `decoder.layers.mlp.linear_fc2.weight` is `[num_layers, hidden,
    ffn]`. Where some layers have experts and some have none, each layer has keys of its own."""
    objects: tuple[str, ...]
    """Keys of the `_extra_state` objects, such as `decoder.layers.mlp.linear_fc2._extra_state/shard_0_2`. Each holds
    None (they would hold FP8 scales), yet a load that asks for one and does not find it fails."""


def sharded_shapes(
    hf_config: Mapping[str, Any], *, padded_vocab_size: int, params_dtype: torch.dtype
) -> CheckpointContent:
    """What a checkpoint of this model must hold, from a model built on the meta device.

    Nothing is allocated, no CUDA is touched, and no torchrun is needed. Process groups must not be running.

    Args:
        hf_config: Mapping of the model's `config.json`.
        padded_vocab_size: Rows of the embedding in megatron-core.
        params_dtype: Dtype of all parameters.

    Raises:
        ConfigError: The model can't be built; names every reason.
    """
    with _alone(), _current_device_is_meta(), no_streams(), torch.device("meta"):
        model = build_model(
            hf_config,
            padded_vocab_size=padded_vocab_size,
            layout=Layout(),
            params_dtype=params_dtype,
            backend="torch",
        )
        content = model.sharded_state_dict()
        apply_factories(content)  # a gated MLP's fc1 is two tensors under one key
        entries = list(nested_values(content))
    return CheckpointContent(
        {e.key: ShardedShape(tuple(e.global_shape), e.dtype) for e in entries if isinstance(e, ShardedTensor)},
        tuple(sorted(e.unique_key for e in entries if isinstance(e, ShardedObject))),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Process groups of one process, on gloo even where there is CUDA: they only tell megatron that it is alone."""
    assert not dist.is_initialized(), "call sharded_shapes before process groups are started"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _current_device_is_meta() -> Iterator[None]:
    """Megatron allocates parameters on `torch.cuda.current_device()`."""
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
