"""`mcore-flows layouts`: how a run's model could be divided over GPUs, ranked by predicted step time and memory."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from configs.schema.train import TrainConfig
from flows.cli_plan import RUNS, AsJson
from flows.run_options import Overrides, RunFile, all_overrides
from flows.tables import plain_table, show
from mcore.bridge.families import dims_of
from mcore.errors import ConfigError, Problem
from mcore.train.planner import Candidate, Machine, rank_layouts
from tasks.preflight import check_run_file

layout_commands = typer.Typer()
ASSUMED = Machine(num_gpus=1)
NAMES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "micro_batch_size": "micro-batch",
    "recompute_granularity": "recompute",
}


@layout_commands.command(rich_help_panel=RUNS)
def layouts(
    run_file: RunFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of one host; the run's processes if not given.")] = None,
    memory_gib: Annotated[float, typer.Option(min=0.1, help="GiB of each GPU.")] = ASSUMED.memory_gib,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="What a GPU by itself reaches.")] = ASSUMED.mfu,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Rank layouts, micro-batches and recomputation for a run's model and batch by predicted step time.

    Only what the run, the model and the memory allow. Starts and makes nothing; the formulas are in docs/planner.md.
    """
    checked = check_run_file(run_file, all_overrides(overrides, None), ask_source=False)
    run, hf_config = checked.run, checked.source.hf_config()
    found = rank_layouts(
        run.train,
        hf_config,
        Machine(num_gpus=gpus or run.launch.num_processes, memory_gib=memory_gib, mfu=mfu),
        row_tokens=run.packing_length or run.data.max_length,
        padded_vocab_size=dims_of(
            hf_config, make_vocab_size_divisible_by=run.convert.make_vocab_size_divisible_by
        ).padded_vocab,
        top=top,
    )
    if not found:
        fix = "Take more GPUs, larger ones, LoRA, or moments in bf16 (use_precision_aware_optimizer)."
        raise ConfigError("no layout fits", [Problem("train", f"one that fits {memory_gib:g} GiB", "none", fix)])
    if as_json:
        typer.echo(json.dumps([layout_as_json(one) for one in found], indent=2))
        return
    columns = (*NAMES.values(), "s/step", "tokens/s", "MFU", "GiB")
    table = plain_table(*columns, right=columns)
    for one in found:
        figures = f"{one.time.total:.3g}", f"{one.tokens_per_s:,.0f}", f"{one.mfu:.1%}", f"{one.memory_gib:.1f}"
        table.add_row(*(str(value or 1) for value in _fields(one.config).values()), *figures)
    show(table)


def _fields(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in NAMES}


def layout_as_json(one: Candidate) -> dict[str, Any]:
    """A layout as `--json` prints it: fields of `train`, seconds by what they go to, bytes of each pipeline stage."""
    method = {name: getattr(one.config, name) for name in ("recompute_method", "recompute_num_layers")}
    return {
        "train": _fields(one.config) | method | {"sequence_parallel": one.config.sequence_parallel},
        "seconds": asdict(one.time) | {"total": one.time.total},
        "tokens_per_s": one.tokens_per_s,
        "mfu": one.mfu,
        "memory": [asdict(stage) | {"total": stage.total} for stage in one.stages],
    }
