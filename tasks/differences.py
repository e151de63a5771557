"""What is other between two artifacts of a stage, as people read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.graph import FILE_FIELDS, LOCAL, STAGES

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


def roles(ingredients: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What tells stages of one kind apart, such as the two proofs: the kind of each input."""
    kinds = {role: str(artifact).partition("/")[0] for role, artifact in ingredients.get("inputs", {}).items()}
    return {(role, "fetch" if kind == LOCAL else kind) for role, kind in kinds.items()}
