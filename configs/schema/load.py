"""From a YAML file and `a.b=c` overrides to a run model, with every problem of it at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.schema.run import RunConfig


class RunFileError(ValueError):
    """A run file that can't be read. `problems` holds (place, what is wrong) pairs."""

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{place}: {what}" for place, what in self.problems))


def read_run_file(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The file's mapping with the overrides put in, not yet validated.

    Args:
        path: A YAML file.
        overrides: `train.lr=1.0e-4` and the like; values are read as YAML.

    Raises:
        RunFileError: The file is missing or no mapping, or an override has no `=` or goes through a scalar.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise RunFileError([(str(path), f"can't be read: {exc.strerror}")]) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise RunFileError([(str(path), f"is no YAML: {exc}")]) from exc
    if not isinstance(raw, dict):
        raise RunFileError([(str(path), f"must hold a mapping, found {type(raw).__name__}")])
    problems = []
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            problems.append((f"--set {override}", "must look like train.lr=1.0e-4"))
            continue
        *groups, field = name.split(".")
        target = raw
        for group in groups:
            child = target.setdefault(group, {})
            if not isinstance(child, dict):
                problems.append((f"--set {override}", f"{group} is a value, not a group"))
                break
            target = child
        else:
            target[field] = _yaml_scalar(value)
    if problems:
        raise RunFileError(problems)
    return raw


def _yaml_scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    # YAML 1.1 takes 1e-4 for text; people who type it on a command line mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def validation_problems(error: ValidationError) -> list[tuple[str, str]]:
    """pydantic's findings as (dotted place, message) pairs."""
    return [
        (
            ".".join(str(part) for part in finding["loc"]) or "run",
            finding["msg"].removeprefix("Value error, ")
            + ("" if finding["type"] in {"missing", "value_error"} else f", found {finding['input']!r}"),
        )
        for finding in error.errors()
    ]


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The validated run of a file.

    Raises:
        RunFileError: All problems of the file at once.
    """
    raw = read_run_file(path, overrides)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as exc:
        raise RunFileError(validation_problems(exc)) from exc
