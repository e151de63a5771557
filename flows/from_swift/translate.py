"""From a command to the mapping of a run, argument by argument; nothing is dropped without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from configs.schema.load import validation_problems
from configs.schema.run import RunConfig
from flows.from_swift import table
from flows.from_swift.command import Command
from flows.from_swift.draft import Draft, Finding, plain, read, shown
from flows.from_swift.rules import LAST, RULES
from flows.from_swift.table import Argument
from mcore.errors import ConfigError, Problem

OUR_OWN = {name: group for group in ("train", "data", "launch") for name in table.field_names(group)}
"""Our fields by name: an argument that nobody knows may be one."""


@dataclass(frozen=True, slots=True)
class Translation:
    """A run, by dotted field names; comments above fields; and what was done with each argument."""

    values: Mapping[str, Any]
    comments: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def needs_a_look(self) -> int:
        """Arguments that change what is learnt, and are not in the run."""
        return sum(finding.needs_a_look for finding in self.findings)


def translate(command: Command, name: str | None = None) -> Translation:
    """The run that a command means.

    Args:
        command: The command.
        name: Name of the run; made of `output_dir` or the model if not given.

    Raises:
        ConfigError: No valid run can be made of it: something that a run can't do without is missing, or ours would
            refuse it.
    """
    given, spelt, unknown = _by_present_names(command.arguments)
    draft = Draft(command, given, spelt)
    draft.values["train.method"] = command.method
    draft.findings.append(Finding("megatron", command.method, "carried", f"train.method: {command.method}"))
    for row in table.arguments():
        if row.name in RULES:
            RULES[row.name](draft, row)
        elif row.name in given:
            _carry(draft, row)
        elif row.target is not None and draft.holds(row.needs):
            _write_default(draft, row)
    for rule in LAST:
        rule(draft)
    if name is not None:
        draft.values["name"] = name
    draft.findings += unknown
    draft.findings += [
        Finding(other, "", "left out", note="another command of the script", effect="nothing")
        for other in map(shown, command.not_read)
    ]
    _check(draft)
    return Translation(draft.values, draft.comments, tuple(draft.findings))


def as_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as a run file nests them."""
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        group, _, name = dotted.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = value
    return tree


def _by_present_names(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    given: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    unknown = []
    for name, value in arguments.items():
        row = table.by_name().get(name)
        if row is None:
            unknown.append(Finding(name, shown(value), "unknown", note=_advice(name), effect="results"))
            continue
        given[row.name] = value
        spelt[row.name] = name
    return given, spelt, unknown


def _advice(name: str) -> str:
    if alike := table.similar_name(name):
        return f"did you mean --{alike}?"
    if name in OUR_OWN:
        return f"a run has {OUR_OWN[name]}.{name}: set it there if that is what was meant"
    return f"not among the arguments of Megatron-SWIFT {table.RELEASE} for pt and sft"


def _carry(draft: Draft, row: Argument) -> None:
    """An argument that was given."""
    value = draft.given[row.name]
    if not draft.holds(row.needs):
        draft.note(row, "left out", f"has no effect without --{row.needs}", effect="nothing")
    elif row.kind in {"same", "other"}:
        is_same = row.kind == "same"
        draft.put(
            row, row.here(value), "carried" if is_same else "changed", row.note, comment="" if is_same else row.note
        )
    elif row.kind == "always":
        value = plain(value)
        if isinstance(row.always, list) and not isinstance(value, list):
            value = [value]
        if value == row.always:
            draft.note(row, "carried", f"always so{f': {row.note}' if row.note else ''}")
        else:
            draft.note(row, "left out", row.note or f"always {shown(row.always)} here")
    elif row.default is not None and plain(value) == row.default:
        draft.note(row, "left out", row.note, effect="nothing")
    else:
        draft.note(row, "left out", row.note)


def _write_default(draft: Draft, row: Argument) -> None:
    """Megatron-SWIFT's default, if ours is another."""
    default = row.default_with(draft.tuner_type)
    assert row.target is not None
    target = table.field(row.target)
    if default is None:
        return
    value = read(target, row.here(default))
    if value != target.default:
        draft.put(row, value, "default", f"{shown(target.default)} here if nothing is said")


def _check(draft: Draft) -> None:
    problems = list(draft.problems)
    if not problems:
        try:
            RunConfig.model_validate(as_tree(draft.values))
        except ValidationError as exc:
            problems += [Problem(f"{place}: {what}") for place, what in validation_problems(exc, RunConfig)]
    if problems:
        raise ConfigError("no run can be made of the command", problems)
