"""Runs under torchrun: megatron-core reads converted checkpoints in each layout, and saves training checkpoints.

bridge_cases.py FOLDER     FOLDER/<model>/release is there, FOLDER/<model>/<layout>/iter_0000003 is made
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import start, stop
from mcore.train.writing import results_of_this_rank
from tests.tiny_models import PADDED_VOCAB_SIZE, mcore_tensors, tiny_hf_model

MODELS = {
    "llama_bias": torch.float32,
    "qwen2": torch.bfloat16,
    "qwen3_tied": torch.bfloat16,
    "phi4_partial": torch.bfloat16,
    "llama_classifier": torch.float32,
}
LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "pp2": Layout(pipeline_model_parallel_size=2),
    "dp2": Layout(),
}
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def check_load(release: Path, name: str, layout: Layout) -> GPTModel:
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
    return model


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


def save_with_optimizer(model: GPTModel, iteration_dir: Path) -> None:
    """Save as training does: weights, and fp32 copies and moments of the distributed optimizer. No weight changes."""
    dtype = model.config.params_dtype
    half = dtype == torch.bfloat16
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(model.config, ddp_config, Float16Module(model.config, model) if half else model)
    config = OptimizerConfig(
        optimizer="adam", lr=0.0, weight_decay=0.0, params_dtype=dtype, bf16=half, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    ddp.zero_grad_buffer()
    optimizer.step()
    weights = model.sharded_state_dict()
    state = {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=dict(OPTIMIZER_FORMAT))}
    if dist.get_rank() == 0:
        iteration_dir.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state | {"iteration": 3}, str(iteration_dir))


def main(folder: Path) -> None:
    results_of_this_rank()
    for case, layout in LAYOUTS.items():
        start(layout)
        for name in MODELS:
            model = check_load(folder / name / "release", name, layout)
            save_with_optimizer(model, folder / name / case / "iter_0000003")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
