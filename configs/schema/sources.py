"""Fields of `data` that say where rows come from and how they are read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from configs.schema.base import StrictModel


class SourceFields(StrictModel):
    """Fields that `data` has beside those of templates and preparation."""

    columns: dict[str, str] = Field(default_factory=dict)
    """New names of columns in all files of the run by their old ones, such as `{question: query}`."""
    adapter: str | None = None
    """YAML file with `columns` and `values` (what values of a column mean) of all files of the run: `docs/data.md`."""
    interleave_prob: tuple[PositiveFloat, ...] = ()
    """Shares of the entries of `dataset`, in their order, such as `[3, 1]`; they need not add up to 1. Without them
    each entry gives all its rows. Not together with `#N`."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """How many rows there are with `interleave_prob`: as many as can be had without repeating one, or as many as it
    takes to have each at least once."""
    max_dropped_rows: int = Field(default=0, ge=0)
    """Broken rows that may be left out of training and validation. With more of them the run ends before training."""
