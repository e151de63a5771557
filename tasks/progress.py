"""How far a training run is, as a Prefect progress artifact that is updated while it runs."""

from __future__ import annotations

import re
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from mcore.metrics import FILE_NAME
from mcore.training_state import latest_step, planned_iterations
from tasks.stage import Job

UPDATE_EVERY_S = 5.0


class TrainingProgress:
    """Reads what a training run writes, and shows iteration, loss, speed and ETA.

    Args:
        job: The training stage.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._artifact: UUID | None = None
        self._next_s = 0.0
        self._first: tuple[int, float] | None = None

    def tick(self, *, now: bool = False) -> None:
        """Update the artifact if it is time to, or `now`. What Prefect makes of it never ends a training run."""
        if not now and time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + UPDATE_EVERY_S
        record = latest_step(self._job.output / FILE_NAME)
        num_iters = planned_iterations(self._job.output)
        if record is None or num_iters is None:
            return
        try:
            self._show(100.0 * record["iteration"] / num_iters, self._describe(record, num_iters))
        except Exception as exc:  # the view, not the work: a server that is away must not cost hours of training
            self._job.say(f"progress can't be shown: {exc}")

    def _show(self, percent: float, text: str) -> None:
        if self._artifact is None:
            key = f"train-{re.sub('[^a-z0-9]+', '-', self._job.run.name).strip('-')}"
            created = create_progress_artifact(progress=percent, key=key, description=text)
            assert isinstance(created, UUID)  # in a synchronous task
            self._artifact = created
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent, description=text)

    def _describe(self, record: dict[str, Any], num_iters: int) -> str:
        iteration, now_s = record["iteration"], time.monotonic()
        text = f"iteration {iteration} of {num_iters}, loss {record['loss']:.4f}, {record['tokens_per_s']:.0f} tokens/s"
        if self._first is None:
            self._first = (iteration, now_s)
        first, since_s = self._first
        if first < iteration < num_iters:  # by the wall clock: saving and validation take time too
            text += f", ETA {(now_s - since_s) / (iteration - first) * (num_iters - iteration):.0f} s"
        return text
