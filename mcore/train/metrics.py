"""What a run tells while it works: `metrics.jsonl`, TensorBoard, a progress line, and `metrics.json` at the end.

Only rank 0 writes. A record is made of the step it is about alone (no mean over the steps since the last record), so a
run that resumes anywhere writes the same records as one that was never interrupted, but for `time`, `step_time_s`,
`tokens_per_s`, `mfu` and `memory_gib`.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from mcore.folders import fsync_path, write_durably
from mcore.metrics import FILE_NAME, append_metrics, read_metrics, truncate_metrics
from mcore.select import Iteration

SUMMARY = "metrics.json"

PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 operations a second of one device, from the makers' data sheets (SXM models, without sparsity)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One finished training step, over all ranks.

    Attributes:
        iteration: Counted from 1.
        loss: Mean over the step's trained tokens, before the step's update (nats).
        grad_norm: Before clipping.
        lr: Learning rate that the step was made with.
        step_time_s: Without saving and validation.
        tokens: Tokens of the step's samples, trained or not, without padding.
        flops: Model FLOPs of the step (`mcore.train.flops`).
        expert_tokens: Tokens that each expert of each layer with experts got, padding not counted; none without.
    """

    iteration: int
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens: int
    flops: float
    expert_tokens: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Speed of this step."""
        return self.tokens / self.step_time_s


def mfu(flops: float, seconds: float, world_size: int) -> float | None:
    """Model FLOPs utilisation: `model_flops / (seconds * devices * peak bf16 FLOPs of the device)`.

    None on a CPU and on a device whose peak is not in `PEAK_BF16_FLOPS`.
    """
    peak = peak_flops()
    return None if peak is None else flops / (seconds * world_size * peak)


def peak_flops() -> float | None:
    """Of this process' device, from `PEAK_BF16_FLOPS`; None on a CPU and on a device that is not there."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for key, value in PEAK_BF16_FLOPS.items() if key in name.split()), None)


def peak_memory_gib() -> float:
    """Peak so far of this process: allocated device memory, or on a CPU resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TrainingLog:
    """Rank 0's records of a run, continued behind `iteration` if the run resumes there.

    Args:
        output: The run's folder.
        iteration: The last one that counts; what was logged behind it is dropped.
        consumed_tokens: Tokens trained on until then.
        logging_steps: Steps between two records.
        world_size: Number of processes.
    """

    def __init__(
        self,
        output: Path,
        *,
        iteration: int,
        consumed_tokens: int,
        logging_steps: int,
        world_size: int,
    ) -> None:
        self.output = output
        self.path = output / FILE_NAME
        self.logging_steps = logging_steps
        self.world_size = world_size
        truncate_metrics(self.path, iteration)
        self.board = self._board_behind(iteration)
        self.started_s = time.monotonic()
        self.tokens_before = self.consumed_tokens = consumed_tokens
        self.training_time_s = 0.0

    def step(self, step: Step, *, consumed_samples: int, last: bool) -> None:
        """Record a step if it is due (the last one always is).

        Args:
            step: The step.
            consumed_samples: Training samples read or passed over until now.
            last: Whether it is the run's last one.
        """
        self.consumed_tokens += step.tokens
        self.training_time_s += step.step_time_s
        if last or step.iteration % self.logging_steps == 0:
            load = {"expert_tokens": step.expert_tokens} if step.expert_tokens else {}
            self._append(
                {
                    "iteration": step.iteration,
                    "loss": step.loss,
                    "grad_norm": step.grad_norm,
                    "lr": step.lr,
                    "step_time_s": step.step_time_s,
                    "tokens_per_s": step.tokens_per_s,
                    "mfu": mfu(step.flops, step.step_time_s, self.world_size),
                    "memory_gib": peak_memory_gib(),
                    "consumed_samples": consumed_samples,
                    "consumed_tokens": self.consumed_tokens,
                    "time": time.time(),
                    **load,
                }
            )

    def validation(self, iteration: int, loss: float) -> None:
        """Record a validation loss, the mean over all trained tokens of the validation rows (nats)."""
        self._append({"iteration": iteration, "validation_loss": loss})

    def bad_step(self, iteration: int, why: str, **more: Any) -> None:
        """Record that an update was left out.

        Args:
            iteration: The step's.
            why: What was wrong with it.
            more: Further figures.
        """
        append_metrics(self.path, {"iteration": iteration, "skipped": why, **more})

    def go_back(self, iteration: int, consumed_tokens: int) -> None:
        """Drop what was recorded behind an iteration, which the run goes on from."""
        self.board.close()
        truncate_metrics(self.path, iteration)
        self.board = self._board_behind(iteration)
        self.tokens_before -= self.consumed_tokens - consumed_tokens
        self.consumed_tokens = consumed_tokens

    def sync(self) -> None:
        """Make the records durable; called before the checkpoint they belong to is declared complete."""
        self.board.flush()
        if self.path.exists():
            fsync_path(self.path)

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        self.board.close()

    def summarise(self) -> dict[str, Any]:
        """Write `metrics.json`, the run in a few figures, and return it. Times are those of this process' share."""
        new_tokens = self.consumed_tokens - self.tokens_before
        summary = summary_of(self.output) | {
            "tokens_per_s": new_tokens / self.training_time_s if self.training_time_s else None,
            "seconds": time.monotonic() - self.started_s,
        }
        write_durably(self.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    def _board_behind(self, iteration: int) -> SummaryWriter:
        return SummaryWriter(str(self.output / "tensorboard"), purge_step=iteration + 1)

    def _append(self, record: dict[str, Any]) -> None:
        append_metrics(self.path, record)
        for name, value in record.items():
            if name == "expert_tokens":
                for layer, tokens in enumerate(value):  # an expert that gets as many as all get on average has 1
                    busiest = max(tokens) * len(tokens) / max(1, sum(tokens))
                    self.board.add_scalar(f"expert_load/busiest_of_layer_{layer}", busiest, record["iteration"])
            elif name not in {"iteration", "time"} and value is not None:
                self.board.add_scalar(name, value, record["iteration"])


def record_changes(output: Path, iteration: Iteration, changes: Mapping[str, Any]) -> None:
    """Record what is different behind an iteration from before it; once, even if the run is killed at once."""
    record = {"iteration": iteration, "changed": dict(changes)}
    path = output / FILE_NAME
    if record not in read_metrics(path):
        append_metrics(path, record)
        fsync_path(path)


def summary_of(output: Path) -> dict[str, Any]:
    """The figures of a run that its records hold: the same however often it was interrupted."""
    records = read_metrics(output / FILE_NAME)
    steps = [record for record in records if "loss" in record]
    validated = [record["validation_loss"] for record in records if record.get("validation_loss") is not None]
    skipped = sum("skipped" in record for record in records)
    return {
        "iterations": records[-1]["iteration"] if records else 0,
        "tokens": steps[-1]["consumed_tokens"] if steps else 0,
        "final_loss": steps[-1]["loss"] if steps else None,
        "first_validation_loss": validated[0] if validated else None,
        "last_validation_loss": validated[-1] if validated else None,
        "best_validation_loss": min(validated, default=None),
        **({"bad_steps": skipped} if skipped else {}),
    }
