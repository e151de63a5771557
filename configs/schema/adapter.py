"""An adapter: what columns of rows are called that have other names, and what their values mean."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from configs.schema.base import StrictModel
from configs.schema.load import RunFileError, read_run_file, validation_problems

Value = bool | int | float | str


class Adapter(StrictModel):
    """One YAML file of a few lines, or a run's `data.columns`."""

    columns: dict[str, str] = Field(default_factory=dict)
    """New names of columns by their old ones, such as `question: query`. A row that has an old name and the new one is
    refused."""
    values: dict[str, dict[str, Value]] = Field(default_factory=dict)
    """New values by old ones, by the column's new name, such as `label: {good: true, bad: false}`. A value that is not
    among them is refused. Old values are given as text: `"1"` for 1, `"true"` for true."""


def load_adapter(path: Path) -> Adapter:
    """The adapter of a file.

    Raises:
        RunFileError: All problems of the file at once.
    """
    raw = read_run_file(path)
    try:
        return Adapter.model_validate(raw)
    except ValidationError as exc:
        raise RunFileError(validation_problems(exc, Adapter)) from exc
