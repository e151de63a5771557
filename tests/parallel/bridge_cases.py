"""Runs under torchrun: megatron-core's own loader reads converted checkpoints in each layout.

bridge_cases.py FOLDER     FOLDER/<model>/release is there
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import start, stop
from tests.tiny_models import PADDED_VOCAB_SIZE, mcore_tensors, tiny_hf_model

MODELS = {"llama_bias": torch.float32, "qwen2": torch.bfloat16, "qwen3_tied": torch.bfloat16}
LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "pp2": Layout(pipeline_model_parallel_size=2),
}


def check_load(release: Path, name: str, layout: Layout) -> None:
    """Load with megatron-core, which refuses a key too many or too few, and compare each shard bit for bit."""
    dtype = MODELS[name]
    hf_model, hf_config = tiny_hf_model(name, dtype=dtype)
    model = build_model(
        hf_config, padded_vocab_size=PADDED_VOCAB_SIZE, layout=layout, params_dtype=dtype, backend="torch"
    )
    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(release), strict="raise_all")
    model.load_state_dict(loaded["model"])
    expected = mcore_tensors(hf_model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE)
    assert sum(compare_shards(model, expected)) == sum(parameter.numel() for parameter in model.parameters())


def compare_shards(model: torch.nn.Module, expected: Mapping[str, Tensor]) -> list[int]:
    """Numbers in each of this rank's shards, all of which are what the family's table says."""
    sizes = []
    for entry in nested_values(model.sharded_state_dict()):
        parts = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                wanted = expected[part.key][part.global_slice()].reshape(part.data.shape)
                assert part.data.dtype == wanted.dtype and torch.equal(part.data, wanted), part.key
                sizes.append(part.data.numel())
    return sizes


def main(folder: Path) -> None:
    for layout in LAYOUTS.values():
        start(layout)
        for name in MODELS:
            check_load(folder / name / "release", name, layout)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
