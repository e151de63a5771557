"""Runs under torchrun: each model in each layout, packed and padded, one after the other.

train_packed_cases.py FOLDER     FOLDER/<model>/ is a base, FOLDER/<case>-<model>/ becomes the run of it
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from configs.schema.run import RunConfig
from mcore.backend.parallel import stop
from mcore.train.run import train
from tests.tiny_runs import tiny_run

DENSE, EXPERTS, LATENT, CAPPED, SINKS = "qwen3_tied", "qwen3_moe", "deepseek_v3", "gemma2", "gpt_oss"
MODELS = (DENSE, EXPERTS, LATENT, CAPPED, SINKS)
"""Dense, experts, latents, windows with capped scores, windows with sinks."""
STEPS = 20

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
# Short rows: several a step, which pipeline stages and ranks must have alike.
SHORT = {"micro_batch_size": 1}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tp2_sp": (TP2_SP, MODELS),
    "tp2_sp_padded": ({**TP2_SP, "packing": False}, (DENSE, EXPERTS)),
    "pp2": ({**PP2, **SHORT}, MODELS),
    "pp2_long": (PP2, (DENSE, LATENT)),
    "pp2_padded": ({**PP2, "packing": False}, (DENSE, EXPERTS)),
    "pp2_vpp2": ({**PP2, "virtual_pipeline_model_parallel_size": 2}, (DENSE, LATENT)),
    "dp2": (SHORT, MODELS),
    "dp2_padded": ({"packing": False}, (DENSE, EXPERTS)),
    "ep2": ({"expert_model_parallel_size": 2, **SHORT}, (EXPERTS, LATENT, SINKS)),
    "cp2": ({"context_parallel_size": 2, **SHORT}, MODELS),
    "cp2_padded": ({"context_parallel_size": 2, "packing": False}, (DENSE, EXPERTS)),
    "ep2_padded": ({"expert_model_parallel_size": 2, "packing": False}, (EXPERTS,)),
}
RUNS = [(case, name) for case, (_, models) in CASES.items() for name in models]


def packed_run(folder: Path, nproc: int, **options: Any) -> RunConfig:
    return tiny_run(folder, nproc=nproc, **({"train_iters": STEPS, "eval_steps": STEPS} | options))


def main(folder: Path) -> None:
    for case, name in RUNS:
        train(packed_run(folder, 2, **CASES[case][0]), folder / name, folder / f"{case}-{name}")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
