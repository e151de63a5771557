"""What a run would do and why, told before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mcore.artifacts import Manifest, Store
from mcore.errors import CheckpointError
from mcore.select import select_checkpoint
from tasks.graph import FILE_FIELDS, LOCAL, STAGES, StagePlan
from tasks.preflight import CheckedRun

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
    decisions = [_decide(stage, checked.store, earlier, now) for stage in checked.stages]
    if checked.store.root.is_dir():  # a plan makes no store, but what it hashed need not be hashed again
        checked.store.digests.save()
    return decisions


def _decide(stage: StagePlan, store: Store, earlier: list[Manifest], now: Mapping[str, str]) -> Decision:
    status = store.status(stage.kind, stage.key)
    if status.manifest is not None:
        inputs: Mapping[str, str] = stage.ingredients["inputs"]
        content = {role: now[artifact] for role, artifact in inputs.items() if artifact in now}
        if outdated := status.manifest.outdated_inputs(content):
            return Decision(stage, "RUN", f"its input {', '.join(outdated)} was made again and is another now")
        return Decision(stage, "REUSE", f"made {status.manifest.created[:16].replace('T', ' ')} UTC")
    if status.state == "damaged":
        return Decision(stage, "RUN", f"damaged: {status.why}")
    return Decision(stage, "RUN", "; ".join([_why_missing(stage, status.why, earlier), *_resumes(stage, store)]))


def _resumes(stage: StagePlan, store: Store) -> Iterator[str]:
    """How far an interrupted training run has come."""
    if stage.kind == "train":
        try:
            yield f"goes on from iteration {select_checkpoint(store.partial(stage.kind, stage.key)).iteration}"
        except CheckpointError:
            return


def _why_missing(stage: StagePlan, why: str, earlier: list[Manifest]) -> str:
    """Why there is no artifact of this key: what is other than in the artifact of this stage that is most like it."""
    wanted = json.loads(json.dumps(stage.ingredients))  # as a manifest gives it back
    alike = [
        (list(_differences(stage.name, manifest.ingredients, wanted)), manifest)
        for manifest in earlier
        if manifest.kind == stage.kind and _roles(manifest.ingredients) == _roles(wanted)
    ]
    differences = min(alike, key=lambda pair: (len(pair[0]), -_age(pair[1])), default=([], None))[0]
    return "; ".join(differences) or why


def _roles(ingredients: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What tells stages of one kind apart, such as the two proofs: the kind of each input."""
    kinds = {role: str(artifact).partition("/")[0] for role, artifact in ingredients.get("inputs", {}).items()}
    return {(role, "fetch" if kind == LOCAL else kind) for role, kind in kinds.items()}


def _age(manifest: Manifest) -> int:
    """Grows with time."""
    return int("".join(character for character in manifest.created if character.isdigit())[:14] or 0)


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
