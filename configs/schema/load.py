"""From a YAML file and `a.b=c` overrides to a run model, with every problem of it at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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
        raw = yaml.load(path.read_text(), _Loader)
    except OSError as exc:
        raise RunFileError([(str(path), f"can't be read: {exc.strerror}")]) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise RunFileError([(str(path), f"is no YAML: {_one_line(exc)}")]) from exc
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
            if target.get(group) is None:
                target[group] = {}
            target = target[group]
            if not isinstance(target, dict):
                problems.append((f"--set {override}", f"{group} is a value, not a group"))
                break
        else:
            try:
                target[field] = _yaml_value(value)
            except yaml.YAMLError as exc:
                problems.append((f"--set {override}", f"the value is no YAML: {_one_line(exc)}"))
    if problems:
        raise RunFileError(problems)
    return raw


class _Loader(yaml.SafeLoader):
    """PyYAML's, but a key that is given twice is an error instead of hiding the first one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by the parent class
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_value(text: str) -> Any:
    # YAML 1.1 takes 1e-4 for text; people who type it on a command line mean the number.
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text):
        return float(text)
    return yaml.load(text, _Loader)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """Findings of pydantic as (dotted place, what is wrong) pairs.

    Args:
        error: What validating raised.
        model: What was validated against; a key that it does not know is compared with those that it knows.
    """
    return [
        (".".join(str(part) for part in finding["loc"]) or "run", what)
        for finding in error.errors(include_url=False)
        for what in _what_is_wrong(finding, model)
    ]


def _what_is_wrong(finding: ErrorDetails, model: type[BaseModel]) -> list[str]:
    if finding["type"] == "value_error":  # a validator of ours, with a line for each of its findings
        return finding["msg"].removeprefix("Value error, ").split("\n")
    return [_in_words(finding, model)]


def _in_words(finding: ErrorDetails, model: type[BaseModel]) -> str:
    kind, message = finding["type"], finding["msg"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        alike = _similar_field(finding["loc"], model)
        return f"unknown key; did you mean {alike}?" if alike else "unknown key"
    if kind == "tuple_type":  # a list in YAML
        message = "input should be a list"
    return f"{message[0].lower()}{message[1:]}, found {finding['input']!r}"


def _similar_field(place: tuple[int | str, ...], model: type[BaseModel]) -> str | None:
    """The dotted place that was probably meant: the name in another group, or a similar name in the same group."""
    *groups, name = (str(part) for part in place if isinstance(part, str))
    known = _fields(model)
    prefix = "".join(f"{group}." for group in groups)
    siblings = [path.removeprefix(prefix) for path in known if path.startswith(prefix)]
    close = get_close_matches(name, [sibling for sibling in siblings if "." not in sibling], n=1)
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    return next(iter([*elsewhere, *(prefix + sibling for sibling in close)]), None)


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a model and of the models in it."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for inner in _models_in(field.annotation):
            names += _fields(inner, f"{prefix}{name}.")
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The validated run of a file.

    Raises:
        RunFileError: All problems of the file at once.
    """
    raw = read_run_file(path, overrides)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as exc:
        raise RunFileError(validation_problems(exc, RunConfig)) from exc
