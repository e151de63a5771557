"""What becomes of each argument of Megatron-SWIFT, as rows of `configs/swift/arguments.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, TypeAdapter
from pydantic.fields import FieldInfo

from configs.schema.base import StrictModel
from configs.schema.run import RunConfig

FILE = Path(str(files("configs"))) / "swift" / "arguments.yaml"
RELEASE = "4.6.0"
"""The release of Megatron-SWIFT whose names and defaults the rows have."""

Kind = Literal["same", "other", "always", "none"]
Effect = Literal["results", "speed", "logging", "files", "nothing"]
EFFECTS: Mapping[Effect, str] = {
    "results": "what is learnt",
    "speed": "speed and memory",
    "logging": "what is logged",
    "files": "which files are written",
    "nothing": "nothing here",
}
"""What leaving an argument out changes, in words."""


class Argument(StrictModel):
    """One row."""

    name: str
    """Its name there."""
    group: str
    """Heading that it stands under."""
    kind: Kind
    """`same`: a field of the same name and meaning; `other`: a field of another name or meaning; `always`: no field, a
    run always does as with the value `always`; `none`: nothing like it."""
    effect: Effect
    """What leaving it out changes."""
    target: str | None = None
    """The field of a run, `group.field`."""
    default: Any = None
    """What it is there if it is not given."""
    lora_default: Any = None
    """The same with `tuner_type lora`, if that is another."""
    always: Any = None
    """The value that a run always has."""
    values: Mapping[str, str] = Field(default_factory=dict)
    """Values that are spelt otherwise here."""
    old_names: tuple[str, ...] = ()
    """Names of earlier releases."""
    needs: str | None = None
    """The argument, and its value, without which it has no effect there."""
    note: str = ""
    """Why, or what to do."""

    def here(self, value: Any) -> Any:
        """A value, or each of a list, as it is spelt here."""
        return [self.here(item) for item in value] if isinstance(value, list) else self.values.get(str(value), value)

    def default_with(self, tuner_type: str) -> Any:
        """What it is there if it is not given."""
        return self.lora_default if tuner_type == "lora" and self.lora_default is not None else self.default


@dataclass(frozen=True, slots=True)
class Target:
    """A field of a run: its default and what it takes."""

    info: FieldInfo

    @property
    def default(self) -> Any:
        """What it is if the run does not say, as YAML has it; None if it must."""
        return None if self.info.is_required() else _plain(self.info.get_default(call_default_factory=True))

    def read(self, value: Any) -> Any:
        """A value as the field takes it, in YAML's types.

        Raises:
            pydantic.ValidationError: It does not take it.
        """
        adapter: TypeAdapter[Any] = TypeAdapter(_annotated(self.info))
        return adapter.dump_python(adapter.validate_python(value), mode="json")

    @property
    def is_list(self) -> bool:
        """Whether it holds several values."""
        annotation = self.info.annotation
        return isinstance(self.default, list) or ("tuple" in str(annotation) and str not in get_args(annotation))


@cache
def arguments() -> tuple[Argument, ...]:
    """All rows, in the file's order."""
    groups: dict[str, list[dict[str, Any]]] = yaml.safe_load(FILE.read_text())
    return tuple(Argument(group=group, **row) for group, rows in groups.items() for row in rows)


@cache
def by_name() -> dict[str, Argument]:
    """Rows by name, earlier names among them."""
    rows = {name: row for row in arguments() for name in row.old_names}
    return rows | {row.name: row for row in arguments()}


def similar_name(name: str) -> str | None:
    """The argument that was probably meant: the same words in another order, or nearly the same letters."""
    same_words = [known for known in by_name() if sorted(known.split("_")) == sorted(name.split("_"))]
    return next(iter([*same_words, *get_close_matches(name, by_name(), n=1, cutoff=0.75)]), None)


def field_names(group: str) -> tuple[str, ...]:
    """Names of a group's fields, its own before those that it takes over from a part."""
    model = _model_of(RunConfig.model_fields[group].annotation)
    return tuple(sorted(model.model_fields, key=lambda name: name not in model.__annotations__))


def field(target: str) -> Target:
    """The field of a run by its dotted name.

    Raises:
        KeyError: There is none.
    """
    model: type[BaseModel] = RunConfig
    *groups, name = target.split(".")
    for group in groups:
        model = _model_of(model.model_fields[group].annotation)
    return Target(model.model_fields[name])


def _model_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_model_of(argument) for argument in get_args(annotation) if argument is not type(None))


def _annotated(info: FieldInfo) -> Any:
    return Annotated[info.annotation, info]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
