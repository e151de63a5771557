"""Where a run is, stage by stage, from files and leases alone: no server is asked, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcore.artifacts import Manifest, Store
from mcore.leases import describe
from mcore.metrics import FILE_NAME as METRICS_FILE
from mcore.runs import RunRecord, StageRecord, maker
from mcore.training_state import latest_step, planned_iterations
from mcore.wording import duration

STATE_WORDS = {
    "running": "running",
    "done": "done",
    "failed": "failed",
    "rejected": "gate said no",
    "stopped": "stopped",
    "cancelled": "cancelled",
    "lost": "killed",
}
"""States of a run as they are shown."""
STYLES = {
    "running": "cyan", "done": "green", "made": "green", "reused": "green", "failed": "red", "gate said no": "red",
    "killed": "red", "stopped": "yellow", "cancelled": "yellow", "gone": "yellow",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StageState:
    """A stage of a run.

    Attributes:
        name: The stage.
        state: `made`, `reused`, `running`, `waiting`, `not reached`, `gone` (made, and not in the store any more), or
            the word for how the run ended, at the stage that ended it.
        artifact: `kind/key` of what it makes.
        seconds: What it took: in this run, or when it was made.
        note: How far it is, or what ended it.
    """

    name: str
    state: str
    artifact: str
    seconds: float | None = None
    note: str = ""


def stage_states(store: Store, record: RunRecord) -> list[StageState]:
    """The stages of a run in their order."""
    found = []
    ended_at = _ended_at(store, record)
    for stage in record.stages:
        manifest = read_manifest(store, stage)
        if stage.name == ended_at:
            note = record.failure.summary if record.failure is not None else ""
            if record.state == "lost" and maker(store, stage.kind, stage.key) is not None:
                note = "its command is still at work: to be taken over by another run, or on its way to its end"
            found.append(StageState(stage.name, STATE_WORDS[record.state], stage.artifact, note=note))
        elif record.state == "running" and (claim := maker(store, stage.kind, stage.key)) is not None:
            by = f"by {describe(claim)}" if claim.run not in {"", record.name} else ""
            note = ", ".join(text for text in (training_note(store, stage), by) if text)
            found.append(StageState(stage.name, "running", stage.artifact, note=note))
        elif stage.name in record.outcomes:
            found.append(_reached(stage, record.outcomes[stage.name], manifest))
        elif manifest is not None:
            state = "made" if manifest.created >= record.started else "reused"
            found.append(StageState(stage.name, state, stage.artifact, manifest.duration_s))
        else:
            state = "waiting" if record.state == "running" else "not reached"
            found.append(StageState(stage.name, state, stage.artifact))
    return found


def _ended_at(store: Store, record: RunRecord) -> str | None:
    """The stage that a run ended at; of one that was killed, the first that was not finished."""
    if record.failure is not None:
        return record.failure.stage
    if record.state != "lost":
        return None
    return next((stage.name for stage in record.stages if read_manifest(store, stage) is None), None)


def _reached(stage: StageRecord, outcome: Mapping[str, Any], manifest: Manifest | None) -> StageState:
    if manifest is None:
        return StageState(stage.name, "gone", stage.artifact, note="made again when a run needs it")
    if outcome["cached"]:
        return StageState(stage.name, "reused", stage.artifact, manifest.duration_s)
    return StageState(stage.name, "made", stage.artifact, float(outcome["seconds"]))


def read_manifest(store: Store, stage: StageRecord) -> Manifest | None:
    """The manifest of what a stage makes, its files not checked; None if there is none that can be read."""
    try:
        return Manifest.read(store.path(stage.kind, stage.key))
    except (OSError, ValueError):
        return None


def training_note(store: Store, stage: StageRecord) -> str:
    """How far a training run is that is under way: `iteration 7 of 24, loss 2.1, 310 tokens/s, about 45.0 s left`."""
    if stage.kind != "train":
        return ""
    output = store.partial(stage.kind, stage.key)
    step, planned = latest_step(output / METRICS_FILE), planned_iterations(output)
    if step is None:
        return "starting"
    of = "" if planned is None else f" of {planned}"
    note = f"iteration {step['iteration']}{of}, loss {step['loss']:.4f}"
    if step.get("tokens_per_s"):
        note += f", {step['tokens_per_s']:,.0f} tokens/s"
    if planned is not None and step.get("step_time_s") and planned > step["iteration"]:
        note += f", about {duration((planned - step['iteration']) * step['step_time_s'])} left"
    try:
        quiet_s = time.time() - (output / METRICS_FILE).stat().st_mtime
    except OSError:
        return note  # it has just been finished
    return (
        note
        if quiet_s < max(60.0, 5 * step.get("step_time_s", 0.0))
        else f"{note}, nothing new for {duration(quiet_s)}"
    )


def where(store: Store, record: RunRecord) -> tuple[str, str]:
    """The stage that a run is at or ended at, and what there is to say about it."""
    states = stage_states(store, record)
    if record.state == "running":
        at = next((one for one in states if one.state == "running"), None)
    else:
        at = next((one for one in states if one.name == _ended_at(store, record)), None)
    return ("", "") if at is None else (at.name, at.note)
