"""A run in the making: what was given, what it has become so far, and what was done with each argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from flows.from_swift import table
from flows.from_swift.command import Command
from flows.from_swift.table import Argument, Effect
from mcore.bridge.hf_config import read_hf_config
from mcore.errors import Problem, SourceError
from mcore.sources import catalogue

Outcome = Literal["carried", "changed", "default", "left out", "to do", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one argument.

    Attributes:
        argument: Its name, as it was given.
        value: Its value in words.
        outcome: `carried`: into a field of the same meaning; `changed`: into another name or meaning; `default`: it was
            not given, and Megatron-SWIFT's default, which is not ours, was written out; `left out`; `to do`: by hand;
            `unknown`: nobody knows it.
        where: The field and what it holds now.
        note: Why, or what to do.
        effect: What changes, if it was left out.
    """

    argument: str
    value: str
    outcome: Outcome
    where: str = ""
    note: str = ""
    effect: Effect = "nothing"

    @property
    def needs_a_look(self) -> bool:
        """Whether the run is not the same without somebody's hand."""
        return self.outcome in {"to do", "unknown"} or (self.outcome == "left out" and self.effect == "results")


@dataclass
class Draft:
    """Everything that rules read and write.

    Attributes:
        command: The command.
        given: Value of each argument that was given, by its present name.
        spelt: The name that it was given by.
        values: Value of each field that the run file will say, by dotted name.
        comments: Comment above a field.
        findings: What was done, in the table's order.
        problems: Why no run can be made.
        source: The run's `model.source`.
    """

    command: Command
    given: Mapping[str, Any]
    spelt: Mapping[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    source: str = ""

    @property
    def tuner_type(self) -> str:
        """`full` or `lora`, or what else Megatron-SWIFT has."""
        return str(self.given.get("tuner_type", "full"))

    def get(self, name: str) -> Any:
        """An argument's value in YAML's types, given or by default."""
        if name in self.given:
            return plain(self.given[name])
        return table.by_name()[name].default_with(self.tuner_type)

    def holds(self, needs: str | None) -> bool:
        """Whether an argument has what it needs to have an effect (`Argument.needs`)."""
        if needs is None:
            return True
        name, _, wanted = needs.partition(" ")
        value = self.get(name)
        if not wanted:
            return value is not None and value is not False
        if wanted.startswith("of "):
            return isinstance(value, int) and value >= int(wanted.split()[1])
        return str(value).lower() == wanted.lower()

    def note(self, row: Argument, outcome: Outcome, note: str = "", *, effect: Effect | None = None) -> None:
        """Record what was done with an argument that was given, or with its default."""
        name = self.spelt.get(row.name, row.name)
        value: Any = "not given"
        if row.name in self.given or row.default is not None:
            value = self.given.get(row.name, row.default_with(self.tuner_type))
        where = ""
        if (
            row.target is not None
            and row.target in self.values
            and outcome in {"carried", "changed", "default", "to do"}
        ):
            where = f"{row.target}: {shown(self.values[row.target])}"
        self.findings.append(Finding(name, shown(value), outcome, where, note, effect or row.effect))

    def put(self, row: Argument, value: Any, outcome: Outcome, note: str = "", *, comment: str = "") -> bool:
        """Put a value into the row's field and record it; False if the field does not take it."""
        assert row.target is not None, row.name
        target = table.field(row.target)
        try:
            self.values[row.target] = read(target, value)
        except ValidationError as exc:
            wrong = exc.errors(include_url=False)[0]["msg"]
            stays = f"; it stays {shown(target.default)}" if target.default is not None else ""
            self.note(row, "left out", f"{row.target}: {wrong[0].lower()}{wrong[1:]}{stays}")
            return False
        if comment:
            self.comments[row.target] = comment
        self.note(row, outcome, note)
        return True

    @cached_property
    def hf_config(self) -> Mapping[str, Any] | None:
        """The model's `config.json`, if that can be told without a network."""
        if self.source in catalogue.names():
            return catalogue.config_of(self.source)
        folder = Path(self.source).expanduser()
        try:
            return read_hf_config(folder) if self.source and folder.is_dir() else None
        except SourceError:
            return None  # told by `mcore-flows plan`


def plain(value: Any) -> Any:
    """A text of the command line as YAML reads it; what YAML can't read stays a text."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, str):
        return value
    if value in {"None", "True", "False"}:
        return {"None": None, "True": True, "False": False}[value]
    try:
        return float(value) if "e" in value.lower() and value[-1:].isdigit() else yaml.safe_load(value)
    except (ValueError, yaml.YAMLError):
        return value


def read(target: table.Target, value: Any) -> Any:
    """A value as a field takes it: the text itself where it is one, else as YAML reads it.

    Raises:
        pydantic.ValidationError: The field takes neither.
    """
    if target.is_list and not isinstance(value, list | tuple):
        value = [value]
    try:
        return target.read(value)
    except ValidationError:
        return target.read(plain(value))


def shown(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value)) or "[]"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"
