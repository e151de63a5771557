"""Runs under torchrun: bytes that each rank holds in several layouts, beside their estimate.

memory_cases.py FOLDER     FOLDER/<rank>.json becomes a list of [case, part, measured, estimated]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks.memory import MODELS, build, configure, estimated, kept_for_backward, micro_batches, static_bytes, step
from mcore.backend.parallel import stop

LENGTH = 64
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense tp2": ("dense", {"tensor_model_parallel_size": 2}),
    "dense tp2 sp": ("dense", TP2_SP),
    "dense pp2": ("dense", {"pipeline_model_parallel_size": 2}),
    "dense dp2": ("dense", {"global_batch_size": 4}),
    "dense dp2 whole": ("dense", {"global_batch_size": 4, "use_distributed_optimizer": False}),
    "experts ep2": ("experts", {"expert_model_parallel_size": 2, "global_batch_size": 4}),
    "experts tp2 sp": ("experts", TP2_SP),
    "latents tp2 sp": ("latents", TP2_SP),
    "latents pp2": ("latents", {"pipeline_model_parallel_size": 2}),
}


def main(folder: Path) -> None:
    found: list[tuple[str, str, float, float]] = []
    for case, (model, settings) in CASES.items():
        config = configure(**settings)
        training, batches = build(MODELS[model], config), micro_batches(MODELS[model], LENGTH)
        step(training, batches)
        measured: dict[str, float] = dict(static_bytes(training))
        if config.pipeline_model_parallel_size == 1:
            measured["activations"] = kept_for_backward(training, batches)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        estimate = estimated(MODELS[model], config, length=LENGTH, num_processes=2, stage=stage)
        found += [(case, part, size, getattr(estimate, part)) for part, size in measured.items()]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
