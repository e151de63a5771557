"""The rows that a run takes, as plain lists: those of all its sources, drawn, and split into training and validation.

For held-out rows, which fit into memory, and as what the stage `prepare` must come to with rows of any size
(`mcore.data.prepare`): its tests compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs.schema.data import DataConfig
from configs.schema.placeholders import FIELD_OF
from mcore.data.rows import Dropped, Method, Row, raise_problems
from mcore.data.sampling import sample, split
from mcore.data.sources.source import NO_VALUE, Source, open_source, read
from mcore.errors import DataError, Problem


def load_rows(config: DataConfig, method: Method) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of a run, checked, filled, drawn and split.

    Training rows come in the order of the files; the order of training is made later (`mcore.data.dataset`). Broken
    rows are left out if `data.max_dropped_rows` allows for all of them; rows that lack a value are never left out,
    because the run's file is wrong then, and not the rows.

    Raises:
        DataError: Everything that is wrong with any file or row of the run.
    """
    problems: list[Problem] = []
    lost: list[Dropped] = []
    if not config.dataset:
        problems.append(Problem("data.dataset", "at least one file", "none"))
    if config.val_dataset and config.split_dataset_ratio:
        problems.append(Problem("data", "val_dataset or split_dataset_ratio", "both", "Leave one of them out."))
    train = _read_specs(config.dataset, config, method, "data.dataset", problems, lost)
    validation = _read_specs(config.val_dataset, config, method, "data.val_dataset", problems, lost)
    if len(lost) > config.max_dropped_rows:
        problems += [item.problem for item in lost]
        if config.max_dropped_rows:
            problems.insert(0, over_budget(len(lost), config))
    if config.split_dataset_ratio and not problems:
        train, validation = split(
            train, config.split_dataset_ratio, seed=config.data_seed, shuffle=config.dataset_shuffle
        )
        if not train or not validation:
            problems.append(
                Problem("data.split_dataset_ratio", "rows on both sides", f"{len(train)} and {len(validation)}")
            )
    raise_problems("the data can't be used", problems)
    return train, validation


def load_files(specs: Iterable[str], config: DataConfig, method: Method, what: str) -> list[Row]:
    """Rows of other files with the same placeholders, system message and seed, such as those for perplexity.

    Args:
        specs: `path` or `path#N`.
        config: Gives placeholders, system message and seed; its own files are not read.
        method: Which kind of row.
        what: Name of the field that holds the specs, for messages.

    Raises:
        DataError: Everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    lost: list[Dropped] = []
    rows = _read_specs(specs, config, method, what, problems, lost)
    problems += [item.problem for item in lost]
    raise_problems("the data can't be used", problems)
    return rows


def read_file(path: Path, method: Method) -> tuple[list[Row], list[Problem]]:
    """Rows of one file as they stand there, and all that is wrong with it."""
    try:
        source = open_source(str(path), DataConfig(dataset=(), model_name="{{NAME}}", model_author="{{AUTHOR}}"))
    except DataError as exc:
        return [], list(exc.problems)
    rows, dropped = _read(source, method)
    return rows, [item.problem for item in dropped]


def over_budget(num_dropped: int, config: DataConfig) -> Problem:
    """More rows would be left out than the run allows."""
    expected = f"at most {config.max_dropped_rows} rows left out (data.max_dropped_rows)"
    return Problem("the run's rows", expected, str(num_dropped), "Mend the rows, or allow for them.")


def _read(source: Source, method: Method) -> tuple[list[Row], list[Dropped]]:
    rows: list[Row] = []
    dropped: list[Dropped] = []
    for item in read(source, method):
        if isinstance(item, Row):
            rows.append(item)
        else:
            dropped.append(item)
    return rows, dropped


def _read_specs(
    specs: Iterable[str],
    config: DataConfig,
    method: Method,
    what: str,
    problems: list[Problem],
    lost: list[Dropped],
) -> list[Row]:
    """Rows of the specs; what is wrong with sources and placeholders goes to `problems`, broken rows to `lost`."""
    sources: dict[str, list[Row]] = {}
    drawn: list[Row] = []
    for index, text in enumerate(specs):
        try:
            source = open_source(text, config)
        except DataError as exc:
            problems += _once(exc, f"{what}[{index}] {text!r}", problems)
            continue
        if source.name not in sources:  # a file that is named twice is read and reported once
            rows, dropped = _read(source, method)
            problems += _without_value(source, dropped)
            lost += [item for item in dropped if item.reason not in NO_VALUE.values()]
            sources[source.name] = rows
        if sources[source.name]:
            key = f"{config.data_seed}:{what}:{index}"
            drawn += sample(sources[source.name], source.spec.num_rows, key=key, shuffle=config.dataset_shuffle)
    return drawn


def _once(error: DataError, where: str, problems: list[Problem]) -> list[Problem]:
    """What is wrong with a source that can't be opened, said once; an entry that is none is named by its place."""
    found = [Problem(where, found=p.found) if not p.expected else p for p in error.problems]
    return [problem for problem in found if problem not in problems]


def _without_value(source: Source, dropped: list[Dropped]) -> list[Problem]:
    """A problem for all rows that lack the same value."""
    problems = []
    for name, reason in sorted(NO_VALUE.items()):
        if found := [item.place for item in dropped if item.reason == reason]:
            subject = f"{source.name}: {len(found)} rows hold {{{{{name}}}}} (first: line {_number(found[0])})"
            problems.append(Problem(subject, f"{FIELD_OF[name]} to be set", "nothing"))
    return problems


def _number(place: str) -> str:
    return place.replace("#", ":").rpartition(":")[2]
