"""What the page of a run tells, read from the store alone: record, manifests, and the files that stages left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mcore.artifacts import Manifest, Store
from mcore.metrics import FILE_NAME, read_metrics
from mcore.runs import RunRecord, StageRecord
from mcore.wording import duration, moment
from tasks.differences import differences, reasons, roles

DATA_REPORT = "data_report.json"
DATA_OVERLAP = "data_overlap.json"
"""In the run's folder: what of its evaluation is in the training rows (`tasks/overlap.py`)."""
FAILURE = "failure.json"
NOT_REACHED = "not reached"
OPEN = ("running", "lost")
"""States of a run whose record says nothing of its stages, as it is written at the end."""


@dataclass(frozen=True, slots=True)
class StageFacts:
    """A stage of the run.

    Attributes:
        record: What was planned.
        state: `made`, `cached`, `in the store` (the run could not say which), `not reached`, or how the run ended.
        why: Why it ran, or why it did not have to.
        seconds: What it took in this run; None if it was not reached.
        manifest: Of its artifact; None if there is none, or it was deleted since.
        folder: Where its files are.
        device: `GPU`, `CPU` or, if nothing says, empty.
        num_processes: Processes, each with a device of its own.
        made_s: Seconds that its artifact took when it was made, or what a failed attempt took.
    """

    record: StageRecord
    state: str
    why: str
    seconds: float | None
    manifest: Manifest | None
    folder: Path
    device: str
    num_processes: int
    made_s: float | None

    @property
    def is_paid_now(self) -> bool:
        """Whether this run paid for it, rather than an earlier one."""
        return self.state not in ("cached", NOT_REACHED)

    @property
    def device_hours(self) -> float:
        """Processes times hours."""
        return self.num_processes * (self.made_s or 0.0) / 3600

    def read(self, file: str) -> dict[str, Any]:
        """A JSON file that the stage wrote; empty if it did not, or it can't be read."""
        return read_object(self.folder / file)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there or holds none."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class RunFacts:
    """A run as the store has it.

    Args:
        store: The store.
        record: The attempt of the run that is told of.
    """

    def __init__(self, store: Store, record: RunRecord) -> None:
        self.store, self.record = store, record
        self.manifests = {f"{one.kind}/{one.key}": one for one in store.manifests()}

    @cached_property
    def stages(self) -> list[StageFacts]:
        """All stages in their order."""
        return [self._stage(stage) for stage in self.record.stages]

    def stage(self, name: str) -> StageFacts | None:
        """The stage of this name, if it was reached."""
        return next((stage for stage in self.reached if stage.record.name == name), None)

    def _stage(self, stage: StageRecord) -> StageFacts:
        outcome = self.record.outcomes.get(stage.name)
        failure = self.record.failure
        manifest = self.manifests.get(stage.artifact)
        state, why, seconds, made_s = NOT_REACHED, "", None, None
        folder = self.store.path(stage.kind, stage.key)
        if outcome is not None:
            state, seconds = ("cached" if outcome.get("cached") else "made"), float(outcome.get("seconds", 0.0))
            made_s = manifest.duration_s if manifest else None if state == "cached" else seconds
            why = self._why_cached(manifest) if state == "cached" else self._why_made(stage, manifest)
        elif failure is not None and failure.stage == stage.name:
            state, folder = self.record.state, self.store.run_dir(self.record.name) / stage.name
            process = read_object(folder / "process.json")
            if process.get("started", 0) >= datetime.fromisoformat(self.record.started).timestamp():
                made_s = seconds = process.get("heartbeat", process["started"]) - process["started"]
            why = f"{failure.error}: {failure.summary}"
        elif manifest is not None and self.record.state in OPEN:
            state, made_s = "in the store", manifest.duration_s
        device, number = self._devices(stage, folder, manifest)
        return StageFacts(stage, state, why, seconds, manifest, folder, device, number, made_s)

    def _why_cached(self, manifest: Manifest | None) -> str:
        if manifest is None:
            return "its artifact was in the store, and was deleted since"
        return f"made {moment(manifest.created)} in {duration(manifest.duration_s)} from the same inputs and settings"

    def _why_made(self, stage: StageRecord, manifest: Manifest | None) -> str:
        """What is other than in the earlier artifact that is most like it."""
        if manifest is None:
            return "its artifact was deleted since"
        earlier = [
            one
            for one in self.manifests.values()
            if one.kind == stage.kind and one.key != stage.key and one.created < self.record.started
            and roles(one.ingredients) == roles(manifest.ingredients)
        ]  # fmt: skip
        if not earlier:
            return "the store had nothing like it"
        told = [
            (reasons(tuple(differences(stage.name, one.ingredients, manifest.ingredients))), one) for one in earlier
        ]
        least, nearest = min(told, key=lambda pair: (len(pair[0]), pair[1].created))
        return f"other than {stage.kind}/{nearest.key[:8]} in: {'; '.join(least)}"

    def _devices(self, stage: StageRecord, folder: Path, manifest: Manifest | None) -> tuple[str, int]:
        """What a stage computed on, as far as its files say, and in how many processes."""
        if stage.kind == "train":
            launch = self.record.config.get("launch", {})
            number = int(launch.get("nproc_per_node", 1)) * int(launch.get("nnodes") or 1)
            if any(record.get("mfu") is not None for record in self.training):
                return "GPU", number
            is_cpu = manifest is not None and manifest.versions.get("torch", "").endswith("+cpu")
            return "CPU" if is_cpu else "", number
        if stage.kind == "evaluate":
            summary = read_object(folder / "summary.json")
            return _device(summary.get("device")), int(summary.get("tensor_parallel_size") or 1)
        if stage.kind == "verify":
            numerical = read_object(folder / "report.json").get("numerical") or {}
            return _device(numerical.get("device")), 1
        return "CPU", 1  # the others move files

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """What training logged, also if it was not finished."""
        plan = next((stage for stage in self.record.stages if stage.kind == "train"), None)
        failure, ended = self.record.failure, self.record.state not in OPEN
        if plan is None or (
            ended and plan.name not in self.record.outcomes and (not failure or failure.stage != plan.name)
        ):
            return []  # what an earlier run trained is not told as if it were this one's
        made = self.store.path(plan.kind, plan.key)
        folder = made if plan.artifact in self.manifests else self.store.partial(plan.kind, plan.key)
        return read_metrics(folder / FILE_NAME)

    @property
    def reached(self) -> list[StageFacts]:
        """The stages that the run came to."""
        return [stage for stage in self.stages if stage.state != NOT_REACHED]

    @property
    def data_report(self) -> dict[str, Any]:
        """What became of the rows; empty if no stage wrote it."""
        found = next((found for stage in self.reached if (found := stage.read(DATA_REPORT))), {})
        return found and found | read_object(self.store.run_dir(self.record.name) / DATA_OVERLAP)

    @property
    def failure(self) -> dict[str, Any]:
        """The digest of what failed the run; empty if nothing did."""
        failure = self.record.failure
        if failure is None or failure.stage is None:
            return {}
        digest = read_object(self.store.run_dir(self.record.name) / failure.stage / FAILURE)
        return digest if _is_of(digest, self.record) else {}

    def lineage(self) -> Iterator[Manifest]:
        """The artifacts that the run came to, and what they were made from, the last one first."""
        return self.store.lineage(*(stage.record.artifact for stage in reversed(self.reached)))


def _device(name: object) -> str:
    return "" if not name else "CPU" if str(name).startswith("cpu") else "GPU"


def _is_of(digest: Mapping[str, Any], record: RunRecord) -> bool:
    """Whether a failure is of this attempt and not one that an earlier attempt left."""
    try:
        return datetime.fromisoformat(digest["time"]).timestamp() >= int(
            datetime.fromisoformat(record.started).timestamp()
        )
    except (KeyError, TypeError, ValueError):
        return False
