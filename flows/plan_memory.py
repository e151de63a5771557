"""The memory that a run's training would need, as `mcore-flows plan` tells it."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from flows.tables import plain_table
from mcore.devices import installed_gpus
from mcore.errors import PipelineError
from mcore.train.memory import DEVICE_PARTS, StageMemory, estimate
from tasks.preflight import CheckedRun


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What a run's training is estimated to need.

    Attributes:
        stages: Of a process of each pipeline stage.
        engine: Whether layers are taken to be Transformer Engine's.
        device_gib: Of the smallest GPU of this machine; None without one.
    """

    stages: list[StageMemory]
    engine: bool
    device_gib: float | None

    @property
    def most_gib(self) -> float:
        """What the process that needs the most needs of its device."""
        return max(stage.total for stage in self.stages) / 2**30


def training_memory(checked: CheckedRun) -> TrainingMemory | None:
    """The estimate for a run on this machine; None if the model is not at hand."""
    try:
        hf_config = checked.source.hf_config()
    except PipelineError:
        return None
    device_gib = device_memory_gib()
    config = checked.run.train
    has_engine = device_gib is not None and importlib.util.find_spec("transformer_engine") is not None
    engine = config.backend == "transformer_engine" or (config.backend == "auto" and has_engine)
    on_gpu = engine or device_gib is not None
    return TrainingMemory(estimate(checked.run, hf_config, engine=engine, on_gpu=on_gpu), engine, device_gib)


def memory_table(memory: TrainingMemory) -> tuple[Table, str]:
    """GiB of a process of each pipeline stage, and a line that says what they are."""
    uses_host = any(stage.host for stage in memory.stages)
    columns = ("stage", *(part.replace("_", " ") for part in DEVICE_PARTS), "GiB", *(["of the host"] * uses_host))
    table = plain_table(*columns, right=columns[1:])
    for number, stage in enumerate(memory.stages):
        figures = [*(getattr(stage, part) for part in DEVICE_PARTS), stage.total, *([stage.host] * uses_host)]
        table.add_row(str(number), *(f"{figure / 2**30:.2f}" for figure in figures))
    text = f"Training is estimated to take {memory.most_gib:.1f} GiB a process, with layers of "
    text += "Transformer Engine" if memory.engine else "torch"
    if memory.device_gib is None:
        return table, f"{text}."
    verdict = "it fits" if memory.most_gib <= memory.device_gib else "IT DOES NOT FIT"
    return table, f"{text}, of {memory.device_gib:.1f} GiB of the device: {verdict}."


def memory_as_json(memory: TrainingMemory | None) -> dict[str, Any] | None:
    """The estimate as `--json` prints it: bytes of each process of a pipeline stage, by what they are for."""
    if memory is None:
        return None
    return {
        "backend": "transformer_engine" if memory.engine else "torch",
        "device_gib": memory.device_gib,
        "stages": [asdict(stage) | {"tensors": stage.tensors, "total": stage.total} for stage in memory.stages],
    }


def device_memory_gib() -> float | None:
    """Memory of the smallest GPU of this machine; None if there is none."""
    return min((gpu.total_gib for gpu in installed_gpus()), default=None)
