"""Runs under torchrun: training of each model in each layout, and resumed runs, one after another.

train_cases.py FOLDER     FOLDER/<model>/ is a base, FOLDER/<case>-<model>/ becomes the run of it
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mcore.backend.parallel import stop
from mcore.errors import ConfigError
from mcore.select import iteration_dir
from mcore.train.run import train
from tests.tiny_runs import tiny_run, write_rows

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": TP2_SP,
    "pp2": PP2,
    "dp2": {},
    # Another split of the same samples, and gradients that every rank holds whole.
    "dp2_whole": {"use_distributed_optimizer": False, "micro_batch_size": 1},
}
NORMED = ("gemma3", "olmo2_bias")
"""Models with norms behind linear layers, or over heads of several ranks: it is their gradients that may go wrong."""
RUNS = [
    *((case, name) for case in CASES for name in ("llama", "qwen3_tied")),
    *((case, name) for case in ("tp2", "tp2_sp") for name in NORMED),
]
SAVE_STEPS = 6
EXPERTS = "qwen3_moe"
EP2 = {"expert_model_parallel_size": 2}
RESUMED: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("dp2_to_dp2", "qwen3_tied"): ({}, {}),
    ("tp2_sp_to_pp2", "qwen3_tied"): (TP2_SP, PP2),
    ("pp2_to_dp2", "qwen3_tied"): (PP2, {}),
    # The optimizer has experts in a part of its own where they are divided in another way than other weights.
    ("pp2_to_ep2", EXPERTS): (PP2, EP2),
    ("ep2_to_pp2", EXPERTS): (EP2, PP2),
}
"""Runs that are taken back to their first checkpoint: the layout they had, and the one that they go on in."""


def back_to_first_checkpoint(run: Path, copy: Path, first: int = SAVE_STEPS, last: int = 12) -> None:
    """What is on disk if a run is killed between its first checkpoint and its last."""
    if dist.get_rank() == 0:
        shutil.copytree(run, copy)
        shutil.rmtree(iteration_dir(copy, last))
        (copy / "latest_checkpointed_iteration.txt").write_text(str(first))
        (copy / "metrics.json").unlink()
    dist.barrier()


def refuse_what_does_not_divide(folder: Path) -> None:
    """A run for one process that was started on two, with one sample a step."""
    output = folder / "undivided"
    try:
        train(tiny_run(folder, global_batch_size=1, micro_batch_size=1), folder / "llama", output)
    except ConfigError as error:
        (folder / f"refused-{dist.get_rank()}").write_text(str(error))
    assert not output.exists()


def train_on_what_rank_0_has(folder: Path) -> None:
    """As if each machine had its own copy of the data, and all but the first one an old one, of other rows."""
    mine = folder / f"machine-{dist.get_rank()}"
    mine.mkdir()
    write_rows(mine / "train.jsonl", 8, seed=dist.get_rank(), longest=16)
    write_rows(mine / "validation.jsonl", 4, seed=0, longest=16)
    train(tiny_run(mine, nproc=2), folder / "llama", folder / "one-reader")


def main(folder: Path) -> None:
    for case, name in RUNS:
        run = tiny_run(folder, nproc=2, save_steps=SAVE_STEPS, **CASES[case])
        train(run, folder / name, folder / f"{case}-{name}")
    for (case, name), (before, after) in RESUMED.items():
        whole, copy = folder / f"{case.partition('_to_')[0]}-{name}", folder / f"{case}-{name}"
        if name == EXPERTS:  # the others are there
            train(tiny_run(folder, nproc=2, save_steps=SAVE_STEPS, **before), folder / name, whole)
        back_to_first_checkpoint(whole, copy)
        train(tiny_run(folder, nproc=2, save_steps=SAVE_STEPS, **after), folder / name, copy)
    refuse_what_does_not_divide(folder)
    train_on_what_rank_0_has(folder)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
