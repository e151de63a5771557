"""Runs under torchrun: training of each layout without overlap and with it, with buckets of a few parameters.

overlap_cases.py FOLDER     FOLDER/<model>/ is a base, FOLDER/<case>-<how>/ becomes the run of it

Behind each update the shares of the weights that a process has to gather are overwritten with NaN: so a module that
does not wait for its weights gives no loss at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from configs.schema.run import RunConfig
from mcore.backend.parallel import stop
from mcore.train import model
from mcore.train.run import train
from tests.parallel.train_cases import back_to_first_checkpoint
from tests.tiny_runs import tiny_run

STEPS, SAVE_STEPS = 8, 4
DENSE, EXPERTS, LATENT, SINKS = "qwen3_tied", "qwen3_moe", "deepseek_v3", "gpt_oss"
MODELS = (DENSE, EXPERTS, LATENT, SINKS)
SETTINGS: Mapping[str, Mapping[str, bool]] = {
    "plain": {},
    "grads": {"overlap_grad_reduce": True},
    "both": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
PACKED: Mapping[str, Any] = {"micro_batch_size": 1}  # short rows: several a step
PADDED: Mapping[str, Any] = {"packing": False, "micro_batch_size": 1}
LORA: Mapping[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "target_modules": ["all-linear"]}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class Case:
    """A model and a layout of some processes."""

    nproc: int
    model: str = DENSE
    settings: Mapping[str, Any] = field(default_factory=dict)
    hows: tuple[str, ...] = ("plain", "both")


CASES: Mapping[str, Case] = {
    "dp2": Case(2, settings=PACKED, hows=tuple(SETTINGS)),
    "dp2_padded": Case(2, settings=PADDED | {"async_save": True}),
    "dp2_whole": Case(2, settings=PACKED | {"use_distributed_optimizer": False}, hows=("plain", "grads")),
    "dp2_bf16": Case(2, settings=PACKED | {"torch_dtype": "bfloat16"}),
    "dp2_recompute": Case(2, settings=PACKED | {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1
    }),
    "dp2_latent": Case(2, LATENT, PACKED),
    "dp2_lora": Case(2, settings=PACKED | LORA),
    "dp2_lora_experts": Case(2, EXPERTS, PADDED | LORA | {"target_modules": ["all-linear", "all-router"]}),
    "ep2": Case(2, EXPERTS, PACKED | {"expert_model_parallel_size": 2}),
    "dp4": Case(4, settings=PADDED),
    "tp2_sp_dp2": Case(4, settings=PACKED | TP2_SP),
    "pp2_dp2": Case(4, settings=PACKED | PP2, hows=tuple(SETTINGS)),
    "pp2_dp2_padded": Case(4, settings=PADDED | PP2),
    "pp2_vpp2_dp2": Case(4, settings=PACKED | PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "cp2_dp2": Case(4, settings=PACKED | {"context_parallel_size": 2}),
    "ep2_dp2": Case(4, EXPERTS, PACKED | {"expert_model_parallel_size": 2}),
    "ep2_dp2_sinks": Case(4, SINKS, PADDED | {"expert_model_parallel_size": 2}),
    "tp2_dp2_lora": Case(4, settings=PACKED | LORA | TP2_SP),
}  # fmt: skip
RUNS = [(case, how) for case, chosen in CASES.items() for how in chosen.hows]
RESUMED = {
    "dp2_again": ("dp2", "both", {}),
    "dp2_plain": ("dp2", "plain", {}),
    "tp2": ("dp2", "both", TP2_SP),
    "pp2": ("dp2", "both", PP2),
    "padded_again": ("dp2_padded", "both", {}),
    "lora_again": ("dp2_lora", "both", {}),
}
"""Runs with overlap that are taken back to their first checkpoint, how they go on, and other settings of them."""


def overlap_run(folder: Path, case: str, how: str, **others: Any) -> RunConfig:
    chosen = CASES[case]
    common = {"train_iters": STEPS, "save_steps": SAVE_STEPS, "eval_steps": 2, "backend": "torch"}
    return tiny_run(folder, nproc=chosen.nproc, **(common | dict(chosen.settings) | dict(SETTINGS[how]) | others))


@torch.no_grad()
def forget_what_others_updated(part: DistributedOptimizer) -> None:
    for chunk in part.model_chunks:
        if not chunk.remove_forward_pre_hook_handles:
            continue
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            size, rank = (
                group.intra_distributed_optimizer_instance_size,
                group.intra_distributed_optimizer_instance_rank,
            )
            for bucket in group.buckets:
                for other, share in enumerate(bucket.param_data.chunk(size)):
                    if other != rank:
                        share.fill_(torch.nan)


def poison_updates() -> None:
    update = DistributedOptimizer.step_with_ready_grads

    def updated(part: DistributedOptimizer) -> bool:
        done: bool = update(part)
        if part.ddp_config.overlap_param_gather:
            forget_what_others_updated(part)
        return done

    DistributedOptimizer.step_with_ready_grads = updated


def main(folder: Path) -> None:
    model.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=1000)
    poison_updates()
    nproc = int(os.environ["WORLD_SIZE"])
    for case, how in RUNS:
        if CASES[case].nproc == nproc:
            train(overlap_run(folder, case, how), folder / CASES[case].model, folder / f"{case}-{how}")
    for name, (before, how, others) in RESUMED.items():
        if CASES[before].nproc == nproc:
            copy = folder / f"resumed-{name}"
            back_to_first_checkpoint(folder / f"{before}-both", copy, SAVE_STEPS, STEPS)
            train(overlap_run(folder, before, how, **others), folder / CASES[before].model, copy)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
