"""The memory that a run's training would need, as `mcore-flows plan` tells it."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

from rich.table import Table

from flows.tables import plain_table
from mcore.devices import installed_gpus
from mcore.errors import PipelineError
from mcore.train.memory import StageMemory, estimate
from tasks.preflight import CheckedRun

PARTS = tuple(field.name for field in fields(StageMemory))


def memory_table(checked: CheckedRun) -> tuple[Table, str] | None:
    """GiB of a process of each pipeline stage, and a line that says what they are; None if the model is not at hand."""
    try:
        hf_config = checked.source.hf_config()
    except PipelineError:
        return None
    device_gib = device_memory_gib()
    config = checked.run.train
    has_engine = device_gib is not None and importlib.util.find_spec("transformer_engine") is not None
    engine = config.backend == "transformer_engine" or (config.backend == "auto" and has_engine)
    on_gpu = engine or device_gib is not None
    stages = estimate(checked.run, hf_config, engine=engine, on_gpu=on_gpu)
    columns = ("stage", *(part.replace("_", " ") for part in PARTS), "GiB")
    table = plain_table(*columns, right=columns[1:])
    for number, stage in enumerate(stages):
        cells = [f"{getattr(stage, part) / 2**30:.2f}" for part in PARTS]
        table.add_row(str(number), *cells, f"{stage.total / 2**30:.2f}")
    most = max(stage.total for stage in stages) / 2**30
    text = f"Training is estimated to take {most:.1f} GiB a process, with layers of "
    text += "Transformer Engine" if engine else "torch"
    if device_gib is None:
        return table, f"{text}."
    verdict = "it fits" if most <= device_gib else "IT DOES NOT FIT"
    return table, f"{text}, of {device_gib:.1f} GiB of the device: {verdict}."


def device_memory_gib() -> float | None:
    """Memory of the smallest GPU of this machine; None if there is none."""
    return min((gpu.total_gib for gpu in installed_gpus()), default=None)
