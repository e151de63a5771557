"""Layouts that the planner chooses for Qwen2.5-7B, -14B and Qwen3-30B-A3B on 2, 4 and 8 GPUs of 141 GiB.

    python -m benchmarks.layouts --card card.md

Nothing is measured: it prints what `mcore.train.planner` predicts, for full training in bf16 on packed rows of 8192
tokens, 16 of them a step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.train import LEAN
from benchmarks.train_cases import SHAPES
from configs.schema.train import TrainConfig
from mcore.bridge.families import dims_of
from mcore.train.planner import Candidate, Machine, rank_layouts

CASES = ("7b", "14b", "30b-a3b")
GPUS = (2, 4, 8)
ROWS, ROW_TOKENS = 16, 8192


def best(shape: str, num_gpus: int, *, lean: bool = False) -> Candidate | None:
    """The layout that is predicted to be the fastest; None if none fits."""
    config = TrainConfig(method="pt", train_iters=100, global_batch_size=ROWS, **(LEAN if lean else {}))
    hf_config = SHAPES[shape]
    padded = dims_of(hf_config, make_vocab_size_divisible_by=128).padded_vocab
    machine = Machine(num_gpus=num_gpus)
    found = rank_layouts(config, hf_config, machine, row_tokens=ROW_TOKENS, padded_vocab_size=padded, top=1)
    return found[0] if found else None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, help="write the table as Markdown")
    options = parser.parse_args()
    lines = [
        "| shape | GPUs | gradients and moments | layout | micro-batch | recompute | s/step | MFU | GiB by stage |",
        "|---|--:|---|---|--:|---|--:|--:|---|",
        *(_row(shape, number, lean) for shape in CASES for number in GPUS for lean in (False, True)),
        "",
    ]
    sys.stdout.write("\n".join(lines))
    if options.card:
        options.card.write_text("\n".join(lines))


def _row(shape: str, num_gpus: int, lean: bool) -> str:
    one = best(shape, num_gpus, lean=lean)
    start = f"| {shape} | {num_gpus} | {'bf16' if lean else 'fp32'} |"
    if one is None:
        return f"{start} none fits | | | | | |"
    config = one.config
    sizes = {
        "TP": config.tensor_model_parallel_size, "PP": config.pipeline_model_parallel_size,
        "VPP": config.virtual_pipeline_model_parallel_size or 1, "CP": config.context_parallel_size,
        "EP": config.expert_model_parallel_size,
    }  # fmt: skip
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    words.insert(0, f"DP{num_gpus // (sizes['TP'] * sizes['PP'] * sizes['CP'])}")
    gib = " ".join(f"{stage.total / 2**30:.0f}" for stage in one.stages)
    return (
        f"{start} {' '.join(words)} | {config.micro_batch_size} | {config.recompute_granularity} "
        f"| {one.time.total:.2f} | {one.mfu:.1%} | {gib} |"
    )


if __name__ == "__main__":
    main()
