"""How many rows of a file are taken, which ones, and in what order: the same for the same seed, everywhere.

Python's own `random.Random`, seeded with a text, draws the same numbers on every machine and in every version since
3.2; NumPy does not promise that.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mcore.data.sources.names import HubDataset, hub_dataset

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """`path` or `path#N`. `num_rows` is None without `#N`: all rows, once. `hub` is set for a hub's data set."""

    path: Path
    num_rows: int | None = None
    hub: HubDataset | None = None


def parse_spec(text: str) -> DatasetSpec | str:
    """The parts of `path#N`, or of a hub's `name#N` (`mcore.data.sources.names`); or in words what is wrong with it."""
    path, mark, count = text.rpartition("#")
    if not mark:
        path = text
    if not path.strip():
        return "no path before #" if mark else "no path"
    if mark and not re.fullmatch(r"[1-9][0-9]{0,11}", count):
        return f"{count!r} after #, where the number of rows belongs"
    hub = hub_dataset(path)
    return hub if isinstance(hub, str) else DatasetSpec(Path(path), int(count) if mark else None, hub)


def sample(rows: Sequence[T], num_rows: int | None, *, key: str, shuffle: bool = True) -> list[T]:
    """Draw rows: without replacement below their number, whole repeats plus a rest without replacement above.

    Args:
        rows: What to draw from, not empty.
        num_rows: How many; None takes all of them in their order.
        key: Seed and purpose of the draw; the same key draws the same rows.
        shuffle: Draw at random; otherwise from the front.
    """
    if num_rows is None:
        return list(rows)
    repeats, rest = divmod(num_rows, len(rows))
    drawn = random.Random(key).sample(rows, rest) if shuffle else list(rows[:rest])
    return [*rows] * repeats + drawn


def shares(sizes: Sequence[int], weights: Sequence[float], *, until_all: bool = False) -> list[int]:
    """How many rows to draw of each source, so that they are in the ratio of the weights.

    Args:
        sizes: Rows of each source, at least one.
        weights: A positive number for each.
        until_all: Take so many that each row is drawn at least once; otherwise so many that none is drawn twice.

    Returns:
        At least one row of each, rounded to whole rows.
    """
    per_weight = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    scale = max(per_weight) if until_all else min(per_weight)
    # Rounded first: 3 rows are 3, not the 2.9999999999999996 or 3.0000000000000004 that floats make of them.
    exact = [round(scale * weight, 6) for weight in weights]
    return [max(1, math.ceil(rows) if until_all else math.floor(rows)) for rows in exact]


def split(rows: Sequence[H], ratio: float, *, seed: int, shuffle: bool = True) -> tuple[list[H], list[H]]:
    """Set rows aside for validation, so that no row is on both sides.

    Equal rows count as one: all copies of a chosen row leave the training rows, and validation has it once.

    Args:
        rows: All rows, copies among them.
        ratio: Fraction of the distinct rows that is set aside, rounded, at least one row.
        seed: Seed of the choice.
        shuffle: Choose at random; otherwise the last ones.

    Returns:
        Training rows with their copies, and validation rows, both in the order of `rows`.
    """
    distinct = list(dict.fromkeys(rows))
    num_chosen = max(1, round(ratio * len(distinct)))
    chosen = set(random.Random(f"{seed}:split").sample(distinct, num_chosen) if shuffle else distinct[-num_chosen:])
    return [row for row in rows if row not in chosen], [row for row in distinct if row in chosen]


def order(num_samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order in which an epoch visits its samples: a permutation of `range(num_samples)`."""
    indices = list(range(num_samples))
    if shuffle:
        random.Random(f"{seed}:epoch:{epoch}").shuffle(indices)
    return indices
