"""How full packed rows get on lengths as conversations have them."""

from __future__ import annotations

import random

import pytest

from mcore.data.dataset import TokenDataset
from mcore.data.prepare.report import packed_fill
from mcore.data.template import Sample
from mcore.train.packing import pack

CAPACITY = 8192


def mixed_lengths(num_samples: int, seed: int) -> list[int]:
    """Tokens of mixed conversations: most are short, some fill a row (a log-normal tail, cut where samples are)."""
    draw = random.Random(seed)
    return [min(CAPACITY, max(16, int(draw.lognormvariate(6.2, 1.1)))) for _ in range(num_samples)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_samples", [1024, 4096])
def test_rows_of_8k_are_99_percent_full_and_no_sample_is_split(num_samples: int, seed: int) -> None:
    sizes = mixed_lengths(num_samples, seed)
    costs = [size + size * size / 4096 for size in sizes]  # as FLOPs grow: attention beside matrices
    rows = pack(sizes, costs, CAPACITY)
    assert sorted(place for row in rows for place in row) == list(range(num_samples))
    assert max(sum(sizes[place] for place in row) for row in rows) <= CAPACITY
    assert sum(sizes) / (len(rows) * CAPACITY) >= 0.99


def test_the_report_tells_the_fill_by_the_samples_of_a_step() -> None:
    lengths = mixed_lengths(2048, seed=1)
    dataset = TokenDataset([Sample([0] * length, [1.0] * length) for length in lengths], seed=1, shuffle=True)
    fill = packed_fill(dataset, CAPACITY)
    assert list(fill) == ["16", "64", "256", "1024"] and fill["1024"] >= 0.98 > fill["16"] > 0.4
    order = dataset.order(0)
    steps = [[lengths[place] - 1 for place in order[start : start + 1024]] for start in (0, 1024)]
    rows = sum(len(pack(step, step, CAPACITY)) for step in steps)
    assert fill["1024"] == pytest.approx(sum(map(sum, steps)) / (rows * CAPACITY), abs=1e-4)
