"""An entry of `data.dataset`, opened: how many rows it has, and any range of them, in flat memory.

    source = open_source("rows.jsonl", config)
    for row in read(source, "sft", 0, source.num_rows):
        ...                                       # a Row, or a Dropped that says why it is none

Row `i` of a source is always the same row, and `read` gives exactly one item for each number of its range, so that
ranges may be read anywhere, by any number of processes: a `Source` is small and travels by pickle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from configs.schema.adapter import Adapter, load_adapter
from configs.schema.data import DataConfig
from configs.schema.load import RunFileError
from configs.schema.placeholders import FIELD_OF, placeholder_values, placeholders_in
from mcore.data.formats.adapt import adapt
from mcore.data.formats.row import to_row
from mcore.data.rows import Dropped, Method, Row, RowError, raise_problems
from mcore.data.sampling import DatasetSpec, parse_spec
from mcore.data.sources import hub
from mcore.data.sources.files import Part, files_of, open_file
from mcore.data.sources.self_cognition import REPOSITORY, VARIANTS
from mcore.errors import DataError, Problem

NO_VALUE = {name: f"no_{field_name.partition('.')[2]}" for name, field_name in FIELD_OF.items()}
"""Reasons of rows with a placeholder that the run has no value for."""


LANGUAGES: tuple[Literal["zh"] | None, ...] = ("zh", None)


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows of one entry are, and what of the run goes into each.

    Attributes:
        name: The entry without `#N`.
        spec: The entry, taken apart; `spec.num_rows` is how many rows the run wants of it.
        parts: Its files in the order of their rows.
        values: What fills placeholders, by their names: of rows in Chinese, and of all others.
        system: The system message of conversations that have none.
        adapter: What columns and values of its rows are called here.
    """

    name: str
    spec: DatasetSpec
    parts: tuple[Part, ...]
    values: Mapping[Literal["zh"] | None, Mapping[str, str]]
    system: str | None
    adapter: Adapter

    @property
    def num_rows(self) -> int:
        """How many rows there are, broken ones among them."""
        return sum(part.num_rows for part in self.parts)


def open_source(entry: str, config: DataConfig) -> Source:
    """The source of an entry of `data.dataset`.

    Args:
        entry: As the run names it, with or without `#N`.
        config: Gives placeholders and the system message; its own entries are not read.

    Raises:
        DataError: The entry is wrong, or what it names is missing, unreachable, empty, or of no known kind.
    """
    spec = parse_spec(entry)
    if not isinstance(spec, DatasetSpec):
        raise DataError("the data can't be used", [Problem(repr(entry), found=spec)])
    problems = _system_problems(config)
    adapter = _adapter(config, problems)
    parts = list(_parts(spec, problems))
    raise_problems("the data can't be used", problems)
    values = {name: placeholder_values(config.model_name, config.model_author, name) for name in LANGUAGES}
    return Source(_name(spec), spec, tuple(parts), values, config.system, adapter)


def _name(spec: DatasetSpec) -> str:
    return str(spec.path if spec.hub is None else spec.hub)


def _parts(spec: DatasetSpec, problems: list[Problem]) -> Iterator[Part]:
    """The files of a source that can be read; what is wrong with the others goes to `problems`."""
    if spec.hub is None:
        files = [("", path, str(path)) for path in files_of(spec.path)]
    else:
        files = [
            (subset, path, f"{spec.hub}/{path.name}")
            for subset, paths in hub.files_of(spec.hub).items()
            for path in paths
        ]
    for subset, path, name in files:
        try:
            part = open_file(path, name)
        except DataError as exc:
            problems += exc.problems
            continue
        is_made = spec.hub is not None and spec.hub.repo == REPOSITORY and subset in VARIANTS
        yield replace(part, variant=subset) if is_made else part


def _system_problems(config: DataConfig) -> list[Problem]:
    missing = placeholders_in(config.system or "") - placeholder_values(config.model_name, config.model_author).keys()
    return [Problem(f"data.system holds {{{{{name}}}}}", f"{FIELD_OF[name]} to be set") for name in sorted(missing)]


def _adapter(config: DataConfig, problems: list[Problem]) -> Adapter:
    """What the run's adapter and its own `columns` say together."""
    if config.adapter is None:
        return Adapter(columns=config.columns)
    try:
        found = load_adapter(Path(config.adapter))
    except RunFileError as exc:
        problems += [Problem(f"data.adapter: {config.adapter}: {place}: {what}") for place, what in exc.problems]
        return Adapter()
    twice = sorted(found.columns.keys() & config.columns.keys())
    if twice:
        problems.append(Problem("data.columns", f"other columns than those of {config.adapter}", ", ".join(twice)))
    return Adapter(columns={**found.columns, **config.columns}, values=found.values)


def read(source: Source, method: Method, start: int = 0, stop: int | None = None) -> Iterator[Row | Dropped]:
    """Rows `start` to `stop` of a source, checked and filled, one item for each number.

    Args:
        source: What `open_source` found.
        method: What the rows are for.
        start: The first row, from 0.
        stop: The row behind the last; None is the end.
    """
    for place, data in _records(source, start, source.num_rows if stop is None else min(stop, source.num_rows)):
        if isinstance(data, RowError):
            yield data.dropped(place)
            continue
        try:
            row = to_row(adapt(data, source.adapter) if isinstance(data, dict) else data, method, place)
        except RowError as exc:
            row = exc.dropped(place)
        yield row if isinstance(row, Dropped) else _filled(row, source)


def _records(source: Source, start: int, stop: int) -> Iterator[tuple[str, Any]]:
    """Place and content of rows `start` to `stop`."""
    first = [0, *accumulate(part.num_rows for part in source.parts)]
    index = bisect_right(first, start) - 1
    while start < stop:
        part, begin = source.parts[index], start - first[index]
        end = min(part.num_rows, stop - first[index])
        yield from part.read(begin, end)
        start, index = first[index + 1], index + 1


def _filled(row: Row, source: Source) -> Row | Dropped:
    row = row.with_system(source.system)
    values = source.values["zh" if row.language == "zh" else None]
    missing = sorted(row.placeholders() - values.keys())
    if missing:
        name = missing[0]
        problem = Problem(f"{row.place}: {{{{{name}}}}}", f"{FIELD_OF[name]} to be set", "nothing")
        return Dropped(NO_VALUE[name], problem, row.place)
    return row.filled(values)
