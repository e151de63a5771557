"""A look at a run's data before anything is started: what is there, and its first rows. No tokenizer, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from configs.schema.data import DataConfig
from mcore.data.prepare.dropped import DroppedRows
from mcore.data.prepare.entries import config_problems, opened
from mcore.data.rows import Dropped, Method
from mcore.data.sources.source import Source, read
from mcore.errors import Problem

FIRST_ROWS = 1000
"""Rows of each source that are looked at; `mcore.data.prepare.build` looks at all."""


def look(config: DataConfig, method: Method) -> tuple[int, list[Problem]]:
    """How many rows a run trains on at most, and what is wrong as far as can be seen.

    Args:
        config: The run's `data`.
        method: What the rows are for.
    """
    problems = config_problems(config)
    num_rows = 0
    for field, entries in (("dataset", config.dataset), ("val_dataset", config.val_dataset)):
        sources, found = look_at(entries, config, method, f"data.{field}")
        problems += found
        if field == "dataset":
            num_rows = sum(source.spec.num_rows or source.num_rows for source in sources)
            num_rows -= config.split_dataset_ratio > 0
    return num_rows, list(dict.fromkeys(problems))


def look_at(
    entries: Iterable[str], config: DataConfig, method: Method, what: str
) -> tuple[list[Source], list[Problem]]:
    """Sources of entries, and what is wrong with these and their first rows.

    Args:
        entries: As in `data.dataset`.
        config: Gives placeholders, system message and the budget of dropped rows; its own entries are not read.
        method: What the rows are for.
        what: Name of the field that holds the entries, for messages.
    """
    problems: list[Problem] = []
    sources = {}
    found = []
    for index, entry in enumerate(entries):
        source = opened(entry, config, f"{what}[{index}] {entry!r}", problems)
        if source is not None:
            found.append(source)
            sources[source.name] = source
    for source in sources.values():
        dropped = DroppedRows()
        for row in islice(read(source, method, 0, FIRST_ROWS), FIRST_ROWS):
            if isinstance(row, Dropped):
                dropped.add(row.reason, row.problem)
        problems += dropped.problems(config)
    return found, problems
