"""What a run would do and why, told before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from mcore.artifacts import Manifest, Store
from mcore.errors import CheckpointError
from mcore.select import select_checkpoint
from tasks.graph import FILE_FIELDS, LINK, LOCAL, STAGES, StagePlan
from tasks.preflight import CheckedRun

JUDGING = ("verify", "evaluate", "compare")
"""Kinds of artifacts that a model is not made from, each behind what it needs."""
MAX_VALUE_CHARACTERS = 60
"""Longer values of a run are cut where they are shown."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a run would do at one stage."""

    stage: StagePlan
    action: Literal["RUN", "REUSE"]
    why: str


def decide(checked: CheckedRun) -> list[Decision]:
    """What a run would do at each of its stages, in their order."""
    earlier = list(checked.store.manifests())
    now = {f"{manifest.kind}/{manifest.key}": manifest.content for manifest in earlier}
    like = _compared_with(checked, earlier)
    decisions = [_decide(stage, checked.store, like, now) for stage in checked.stages]
    if checked.store.root.is_dir():  # a plan makes no store, but what it hashed need not be hashed again
        checked.store.digests.save()
    return decisions


def _compared_with(checked: CheckedRun, earlier: list[Manifest]) -> list[list[Manifest]]:
    """Earlier artifacts that say what is other now: the run's own first, then all; none of a run that is new."""
    folder = checked.store.run_dir(checked.run.name)
    if not folder.is_dir():
        return []
    by_name = {f"{manifest.kind}/{manifest.key}": manifest for manifest in earlier}
    published = (folder / LINK).resolve()
    own: set[str] = set()
    pending = [f"{published.parent.name}/{published.name}"]
    while pending:
        name = pending.pop()
        if name in by_name and name not in own:
            own.add(name)
            pending += by_name[name].inputs.values()
    # What the model was made from is its lineage; what judges it was made from that.
    judged = own | {source for name in own for source in by_name[name].inputs.values()}
    for kind in JUDGING:
        judged |= {name for name, m in by_name.items() if m.kind == kind and judged >= set(m.inputs.values())}
    own = judged & by_name.keys()
    return [[by_name[name] for name in sorted(own)], earlier]


def _decide(stage: StagePlan, store: Store, like: list[list[Manifest]], now: Mapping[str, str]) -> Decision:
    status = store.status(stage.kind, stage.key)
    if status.manifest is not None:
        inputs: Mapping[str, str] = stage.ingredients["inputs"]
        content = {role: now[artifact] for role, artifact in inputs.items() if artifact in now}
        if outdated := status.manifest.outdated_inputs(content):
            return Decision(stage, "RUN", f"its input {', '.join(outdated)} was made again and is another now")
        return Decision(stage, "REUSE", f"made {status.manifest.created[:16].replace('T', ' ')} UTC")
    if status.state == "damaged":
        return Decision(stage, "RUN", f"damaged: {status.why}")
    return Decision(stage, "RUN", "; ".join([_why_missing(stage, status.why, like), *_resumes(stage, store)]))


def _resumes(stage: StagePlan, store: Store) -> Iterator[str]:
    """How far an interrupted training run has come."""
    if stage.kind == "train":
        try:
            yield f"goes on from iteration {select_checkpoint(store.partial(stage.kind, stage.key)).iteration}"
        except CheckpointError:
            return


def _why_missing(stage: StagePlan, why: str, like: list[list[Manifest]]) -> str:
    """Why there is no artifact of this key: what is other than in the artifact of this stage that is most like it."""
    wanted = json.loads(json.dumps(stage.ingredients))  # as a manifest gives it back
    for earlier in like:
        alike = [
            (list(_differences(stage.name, manifest.ingredients, wanted)), manifest)
            for manifest in earlier
            if manifest.kind == stage.kind and _roles(manifest.ingredients) == _roles(wanted)
        ]
        if alike:
            differences = min(alike, key=lambda pair: (len(pair[0]), -_time(pair[1])))[0]
            return "; ".join(differences) or why
    return why if like else "new run"


def _roles(ingredients: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What tells stages of one kind apart, such as the two proofs: the kind of each input."""
    kinds = {role: str(artifact).partition("/")[0] for role, artifact in ingredients.get("inputs", {}).items()}
    return {(role, "fetch" if kind == LOCAL else kind) for role, kind in kinds.items()}


def _time(manifest: Manifest) -> float:
    """When it was made, in seconds."""
    return datetime.fromisoformat(manifest.created).timestamp()


def _differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before.get("version") != now["version"]:
        yield f"the stage works in another way (version {before.get('version')} -> {now['version']})"
    if before.get("source") != now.get("source"):
        yield f"model.source: {_short(before.get('source'))} -> {_short(now.get('source'))}"
    old, new = before.get("config", {}), now["config"]
    for field in sorted({*old, *new}):
        if old.get(field) != new.get(field):
            if field in FILE_FIELDS:
                yield f"{field}: other files, or other content"
            else:
                yield f"{field}: {_short(old.get(field))} -> {_short(new.get(field))}"
    made_by = next(stage.inputs for stage in STAGES if stage.name == name)
    changed = [
        "the model folder" if artifact.startswith(f"{LOCAL}/") else made_by[role]
        for role, artifact in now["inputs"].items()
        if before["inputs"].get(role) != artifact
    ]
    if changed:
        yield f"its input changes: {', '.join(changed)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"
