"""Which rows of which sources a run takes, told by their numbers before any is read.

Rows are drawn by number, so that a draw of 500 out of a million reads 500. That a row can't be used is found when it is
read: it is left out where the draw put it, and counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from configs.schema.data import DataConfig
from mcore.data.prepare.entries import config_problems, opened
from mcore.data.rows import Dropped, Method, Row, raise_problems
from mcore.data.sampling import sample, shares
from mcore.data.sources.source import Source, read

ROWS_AT_ONCE = 2000
"""Rows of a part."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a source that are read at once.

    Attributes:
        source: Its number among the sources.
        start: The first row.
        stop: The row behind the last.
        wanted: Which of them; None for all.
    """

    source: int
    start: int
    stop: int
    wanted: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are taken."""
        return self.stop - self.start if self.wanted is None else len(self.wanted)

    def read(self, sources: tuple[Source, ...], method: Method) -> Iterator[Row | Dropped]:
        """The rows, or why they can't be used."""
        rows = read(sources[self.source], method, self.start, self.stop)
        if self.wanted is None:
            return rows
        wanted = set(self.wanted.tolist())
        return (row for number, row in enumerate(rows, start=self.start) if number in wanted)


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a run.

    Attributes:
        sources: Each source once.
        taken: The rows that are taken of each source, rising, `[rows]`, int64.
        train: Numbers of the training rows, counted over all that are taken, `[rows]`, int64; some may be there
            several times.
        validation: Those of `data.val_dataset`.
    """

    sources: tuple[Source, ...]
    taken: tuple[np.ndarray, ...]
    train: np.ndarray
    validation: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows that are read."""
        return sum(map(len, self.taken))

    def parts(self) -> Iterator[Part]:
        """All rows that are taken, in their order, in parts that depend on nothing but these."""
        for number, (source, taken) in enumerate(zip(self.sources, self.taken, strict=True)):
            for start in range(0, source.num_rows, ROWS_AT_ONCE):
                stop = min(source.num_rows, start + ROWS_AT_ONCE)
                wanted = taken[slice(*np.searchsorted(taken, [start, stop]))]
                if len(wanted):
                    yield Part(number, start, stop, None if len(wanted) == stop - start else wanted)


def select(config: DataConfig) -> Selection:
    """Open the sources of a run and draw from them.

    Raises:
        DataError: Everything that is wrong with the run's data and can be known without reading rows.
    """
    problems = config_problems(config)
    sources: dict[str, Source] = {}
    named: list[tuple[str, int, Source]] = []
    for field, entries in (("dataset", config.dataset), ("val_dataset", config.val_dataset)):
        what = f"data.{field}"
        for index, entry in enumerate(entries):
            source = opened(entry, config, f"{what}[{index}] {entry!r}", problems)
            if source is not None:
                sources.setdefault(source.name, source)
                named.append((field, index, source))
    raise_problems("the data can't be used", list(dict.fromkeys(problems)))
    mixed = _mixed([source.num_rows for field, _, source in named if field == "dataset"], config)
    draws: list[tuple[str, str, np.ndarray]] = []
    for field, index, source in named:
        num_rows = mixed[index] if mixed and field == "dataset" else source.spec.num_rows
        key = f"{config.data_seed}:data.{field}:{index}"
        drawn = sample(range(source.num_rows), num_rows, key=key, shuffle=config.dataset_shuffle)
        draws.append((field, source.name, np.array(drawn, np.int64)))
    taken = {name: np.unique(np.concatenate([rows for _, of, rows in draws if of == name])) for name in sources}
    first = dict(zip(taken, np.cumsum([0, *map(len, taken.values())]), strict=False))

    def numbers(field: str) -> np.ndarray:
        found = [first[name] + np.searchsorted(taken[name], rows) for of, name, rows in draws if of == field]
        return np.concatenate([np.empty(0, np.int64), *found])

    return Selection(tuple(sources.values()), tuple(taken.values()), numbers("dataset"), numbers("val_dataset"))


def _mixed(sizes: list[int], config: DataConfig) -> list[int]:
    """Rows to draw of each entry of `dataset` by `interleave_prob`; none without it."""
    if not config.interleave_prob:
        return []
    return shares(sizes, config.interleave_prob, until_all=config.stopping_strategy == "all_exhausted")


def set_aside(rows: np.ndarray, firsts: np.ndarray, ratio: float, *, seed: int, shuffle: bool) -> np.ndarray:
    """Which of some rows go to validation, so that no row is on both sides: all copies of a chosen row are chosen.

    The choice is that of `mcore.data.sampling.split`.

    Args:
        rows: The rows, copies among them, `[rows]`.
        firsts: For each number of a row, the number of the first row of the same content.
        ratio: Fraction of the distinct rows that is chosen, rounded, at least one row.
        seed: Seed of the choice.
        shuffle: Choose at random; otherwise the last ones.

    Returns:
        Whether each row is chosen, `[rows]`, bool.
    """
    content = firsts[rows]
    _, first_places = np.unique(content, return_index=True)
    distinct = content[np.sort(first_places)]
    num_chosen = max(1, round(ratio * len(distinct)))
    if shuffle:
        chosen = random.Random(f"{seed}:split").sample(range(len(distinct)), num_chosen)
    else:
        chosen = list(range(len(distinct) - num_chosen, len(distinct)))
    return np.isin(content, distinct[chosen])


def first_of_each(rows: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Some rows without later copies, in their order."""
    _, places = np.unique(firsts[rows], return_index=True)
    return rows[np.sort(places)]
