"""Entries of `data.dataset` and `data.val_dataset`: what is wrong with them before any row is read. Light: no numpy."""

from __future__ import annotations

from configs.schema.data import DataConfig
from mcore.data.sources.source import Source, open_source
from mcore.errors import DataError, Problem


def config_problems(config: DataConfig) -> list[Problem]:
    """What is wrong with a run's data whatever is in the files."""
    problems = []
    if not config.dataset:
        problems.append(Problem("data.dataset", "at least one file", "none"))
    if config.val_dataset and config.split_dataset_ratio:
        problems.append(Problem("data", "val_dataset or split_dataset_ratio", "both", "Leave one of them out."))
    return problems


def opened(entry: str, config: DataConfig, where: str, problems: list[Problem]) -> Source | None:
    """A source, or None and what is wrong with it; an entry that is none is named by its place in the run."""
    try:
        return open_source(entry, config)
    except DataError as exc:
        problems += [problem if problem.expected else Problem(where, found=problem.found) for problem in exc.problems]
        return None
