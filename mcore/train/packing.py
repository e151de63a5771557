"""Which samples of a step share a row: as few rows as hold them, alike in cost, as many on every rank. No torch here.

Everything follows from lengths and costs alone, so that all ranks find the same rows without a word between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = list[list[int]]
"""Places of the samples of each row."""


def pack(sizes: Sequence[int], costs: Sequence[float], capacity: int, count_multiple: int = 1) -> Rows:
    """Divide samples over rows.

    There are as few rows as could hold all tokens. The samples are dealt out, the most costly first, each to the row
    that has cost least so far and has room for it (longest processing time first). Where that leaves a sample over,
    each goes to the row that it fills best instead, the longest first (best fit decreasing); and where that does too,
    there are more rows.

    Args:
        sizes: Tokens of each sample, at most `capacity`.
        costs: What computing each sample takes, in any unit.
        capacity: Tokens that a row holds.
        count_multiple: The number of rows is a multiple of this; some may be empty.

    Returns:
        Rows of places in `sizes`: every place is in one of them.
    """
    assert max(sizes, default=0) <= capacity, "a sample is longer than a row"
    step = max(1, count_multiple)
    num_rows = max(1, math.ceil(sum(sizes) / capacity / step)) * step
    while True:
        for deal in (_least_loaded, _best_fit):
            if (rows := deal(sizes, costs, capacity, num_rows)) is not None:
                return rows
        num_rows += step


def rows_of_rank(rows: Rows, costs: Sequence[float], num_ranks: int, rank: int) -> Rows:
    """The rows of one rank, the most costly first.

    All ranks compute rows of like cost at the same time, as they wait for each other between layers where experts are
    divided. Who gets the most costly of a round takes turns, there and back, so that sums are alike as well.

    Args:
        rows: All rows of a step, a multiple of `num_ranks`.
        costs: Of each sample.
        num_ranks: Data parallel ranks.
        rank: One of them.
    """
    order = sorted(range(len(rows)), key=lambda row: (-sum(costs[place] for place in rows[row]), row))
    rounds = [order[start : start + num_ranks] for start in range(0, len(order), num_ranks)]
    return [rows[of_round[rank if number % 2 == 0 else -1 - rank]] for number, of_round in enumerate(rounds)]


def _least_loaded(sizes: Sequence[int], costs: Sequence[float], capacity: int, num_rows: int) -> Rows | None:
    rows: Rows = [[] for _ in range(num_rows)]
    room, load = [capacity] * num_rows, [0.0] * num_rows
    for place in sorted(range(len(sizes)), key=lambda place: (-costs[place], place)):
        fitting = [row for row in range(num_rows) if room[row] >= sizes[place]]
        if not fitting:
            return None
        row = min(fitting, key=lambda row: (load[row], row))
        rows[row].append(place)
        room[row] -= sizes[place]
        load[row] += costs[place]
    return rows


def _best_fit(sizes: Sequence[int], costs: Sequence[float], capacity: int, num_rows: int) -> Rows | None:
    rows: Rows = [[] for _ in range(num_rows)]
    room = [capacity] * num_rows
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        fitting = [row for row in range(num_rows) if room[row] >= sizes[place]]
        if not fitting:
            return None
        row = min(fitting, key=lambda row: (room[row], row))
        rows[row].append(place)
        room[row] -= sizes[place]
    return rows
