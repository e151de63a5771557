"""What is other now than in the earlier artifact of a stage that is most like it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mcore.artifacts import Manifest
from mcore.runs import judged, lineage, published
from tasks.graph import FILE_FIELDS, LOCAL, STAGES, StagePlan
from tasks.preflight import CheckedRun

MAX_VALUE_CHARACTERS = 60
"""Longer values of a run are cut where they are shown."""

MODEL_FOLDER = "the model folder"


@dataclass(frozen=True, slots=True)
class Difference:
    """One ingredient of a key that is other than it was.

    `what` is `version`, `again` (the stage's word in `launch.again`), `model.source`, a field of the run, or what the
    input is: a stage, or the model folder.
    """

    what: str
    before: Any
    now: Any
    is_input: bool = False

    def __str__(self) -> str:
        if self.what == "version":
            return f"the stage works in another way (version {self.before} -> {self.now})"
        if self.what == "again":
            return f"launch.again: {'not asked for' if self.now is None else short(self.now)}"
        if self.what in FILE_FIELDS:
            return f"{self.what}: other files, or other content"
        return f"{self.what}: {short(self.before)} -> {short(self.now)}"


@dataclass(frozen=True, slots=True)
class Nearest:
    """The earlier artifact of a stage that is most like what is wanted, and all that is other."""

    manifest: Manifest
    differences: tuple[Difference, ...]

    @property
    def artifact(self) -> str:
        """`kind/key`."""
        return f"{self.manifest.kind}/{self.manifest.key}"


class Earlier:
    """The artifacts of a store, read once, and those among them that a run is compared with.

    Args:
        checked: The run.
    """

    def __init__(self, checked: CheckedRun) -> None:
        self.by_name = {f"{manifest.kind}/{manifest.key}": manifest for manifest in checked.store.manifests()}
        self.is_new_run = not checked.store.run_dir(checked.run.name).is_dir()
        model = published(checked.store, checked.run.name)
        own = judged(self.by_name, lineage(self.by_name, *([model] if model is not None else [])))
        self._tiers = ([self.by_name[name] for name in sorted(own)], list(self.by_name.values()))

    def nearest(self, stage: StagePlan, but: str | None = None) -> Nearest | None:
        """What the run itself published last counts first, then what is most like; of several the newest.

        Args:
            stage: What is wanted.
            but: Artifact (`kind/key`) that is not looked at.
        """
        wanted = json.loads(json.dumps(stage.ingredients))  # as a manifest gives it back
        for manifests in self._tiers:
            alike = [
                Nearest(manifest, tuple(differences(stage.name, manifest.ingredients, wanted)))
                for manifest in manifests
                if manifest.kind == stage.kind
                and f"{manifest.kind}/{manifest.key}" != but
                and _roles(manifest.ingredients) == _roles(wanted)
            ]
            if alike:
                return min(alike, key=lambda one: (len(reasons(one.differences)), -_time(one.manifest)))
        return None


def differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """What is other between the ingredients of two artifacts of a stage."""
    if before.get("version") != now["version"]:
        yield Difference("version", before.get("version"), now["version"])
    if before.get("source") != now.get("source"):
        yield Difference("model.source", before.get("source"), now.get("source"))
    if before.get("again") != now.get("again"):
        yield Difference("again", before.get("again"), now.get("again"))
    old, new = before.get("config", {}), now["config"]
    for field in sorted({*old, *new}):
        if old.get(field) != new.get(field):
            yield Difference(field, old.get(field), new.get(field))
    made_by = next(stage.inputs for stage in STAGES if stage.name == name)
    for role, artifact in now["inputs"].items():
        if before["inputs"].get(role) != artifact:
            what = MODEL_FOLDER if artifact.startswith(f"{LOCAL}/") else made_by.get(role, role)
            yield Difference(what, before["inputs"].get(role), artifact, is_input=True)


def reasons(found: tuple[Difference, ...]) -> list[str]:
    """The differences as people read them; inputs are named together, as they change together."""
    inputs = [difference.what for difference in found if difference.is_input]
    told = [str(difference) for difference in found if not difference.is_input]
    return [*told, *([f"its input changes: {', '.join(inputs)}"] if inputs else [])]


def short(value: Any) -> str:
    """A value on one line, cut if it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"


def _roles(ingredients: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What tells stages of one kind apart, such as the two proofs: the kind of each input."""
    kinds = {role: str(artifact).partition("/")[0] for role, artifact in ingredients.get("inputs", {}).items()}
    return {(role, "fetch" if kind == LOCAL else kind) for role, kind in kinds.items()}


def _time(manifest: Manifest) -> float:
    """When it was made, in seconds."""
    return datetime.fromisoformat(manifest.created).timestamp()
