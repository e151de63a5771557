"""Stores as runs leave them, without running anything: real manifests and records of made-up content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore.artifacts import Manifest, Store, digest_of, publish_link
from mcore.runs import Failure, RunRecord, StageRecord, State, begin, end
from tasks.graph import StagePlan
from tasks.preflight import CheckedRun, check_run

STARTED = "2026-11-24T07:00:00.000000+00:00"
ENDED = "2026-11-24T07:30:00.000000+00:00"


def checked_run(raw: Mapping[str, Any], **changes: Any) -> CheckedRun:
    """A run of `write_workspace` with some of its fields changed: `train__lr=1.0`."""
    copy = json.loads(json.dumps(raw))
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            copy.setdefault(group, {})[field] = value
        else:
            copy[group] = value
    return check_run(copy)


def commit(
    store: Store,
    plan: StagePlan,
    *,
    text: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    duration_s: float = 0.0,
) -> None:
    """Make a stage's artifact, as far as the store can tell."""
    folder = store.partial(plan.kind, plan.key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(plan.name if text is None else text)
    content = {f"{manifest.kind}/{manifest.key}": manifest.content for manifest in store.manifests()}
    store.commit(
        plan.kind, plan.key, inputs=plan.inputs,
        input_content={role: content.get(artifact, "") for role, artifact in plan.inputs.items()},
        ingredients=plan.ingredients, metrics=metrics or {}, versions={"code": "abc", "torch": "2.13.0"},
        duration_s=duration_s,
    )  # fmt: skip


def record_of(checked: CheckedRun) -> RunRecord:
    """The record of a run that starts."""
    stages = tuple(StageRecord(plan.name, plan.kind, plan.key, plan.inputs) for plan in checked.stages)
    config = checked.run.model_dump(mode="json")
    return RunRecord(checked.run.name, "pipeline", config, stages, str(Path.cwd()), 1, STARTED)


def finish(
    checked: CheckedRun,
    state: State = "done",
    *,
    until: str | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> None:
    """Run a run, as far as the store can tell.

    Args:
        checked: The run.
        state: How it ends.
        until: The stage that it ends at, if it does not end well.
        metrics: Figures by stage.
        seconds: What a stage takes; 1 s if not given.
    """
    store = Store(checked.run.launch.store)
    record = record_of(checked)
    begin(store, record)
    outcomes: dict[str, dict[str, Any]] = {}
    failure = None
    for plan in checked.stages:
        if plan.name == until:
            failure = Failure(plan.name, plan.artifact, "PipelineError", "it went wrong")
            break
        is_there = store.find(plan.kind, plan.key) is not None
        if not is_there:
            took = (seconds or {}).get(plan.name, 1.0)
            commit(store, plan, metrics=(metrics or {}).get(plan.name), duration_s=took)
        outcomes[plan.name] = {"cached": is_there, "seconds": 1.0}
    else:
        exported = next(plan for plan in checked.stages if plan.kind == "export")
        publish_link(store.run_dir(record.name) / "model", store.path(exported.kind, exported.key))
    end(store, replace(record, state=state, ended=ENDED, outcomes=outcomes, failure=failure))


def many_artifacts(store: Store, like: Manifest, number: int) -> None:
    """Artifacts with manifests of their own, made at once: `commit` would wait for the disk at each."""
    for index in range(number):
        config = {**like.ingredients.get("config", {}), "train.seed": 1000 + index}
        ingredients = {**like.ingredients, "config": config}
        manifest = Manifest(
            like.kind, digest_of(ingredients), like.files, like.inputs, like.input_content, ingredients, like.metrics,
            like.versions, like.created, like.duration_s,
        )  # fmt: skip
        folder = store.path(manifest.kind, manifest.key)
        folder.mkdir(parents=True)
        for name in manifest.files:
            (folder / name).write_text(name)
        (folder / "manifest.json").write_text(manifest.to_json())
