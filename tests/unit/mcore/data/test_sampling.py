"""Properties of drawing, splitting and ordering."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore.data.sampling import DatasetSpec, order, parse_spec, sample, shares, split

ROWS = st.lists(st.integers(), min_size=1, max_size=40, unique=True)
SEEDS = st.integers(min_value=0, max_value=2**32)


@given(ROWS, st.integers(min_value=1, max_value=200), SEEDS, st.booleans())
def test_a_sample_has_its_size_and_takes_rows_evenly(rows, num_rows, seed, shuffle):
    drawn = sample(rows, num_rows, key=f"{seed}", shuffle=shuffle)
    assert len(drawn) == num_rows
    counts = Counter(drawn)
    assert set(counts) <= set(rows)
    repeats, rest = divmod(num_rows, len(rows))
    assert sorted(counts[row] - repeats for row in rows) == [0] * (len(rows) - rest) + [1] * rest
    assert drawn == sample(rows, num_rows, key=f"{seed}", shuffle=shuffle)
    if not shuffle:
        assert drawn == [rows[index % len(rows)] for index in range(num_rows)]


def test_all_rows_in_their_order_without_a_number():
    assert sample([3, 1, 2], None, key="1") == [3, 1, 2]


def test_draws_depend_on_the_key_and_reach_every_row():
    draws = [tuple(sample(range(10), 3, key=f"{seed}")) for seed in range(200)]
    assert len(set(draws)) > 150
    assert all(40 <= count <= 80 for count in Counter(row for draw in draws for row in draw).values())


def test_draws_stay_the_same_in_every_version():
    # A change here makes every artifact and every interrupted run read other samples.
    assert sample(range(100), 5, key="42:data.dataset:0") == [70, 61, 15, 66, 75]
    assert order(8, seed=42, epoch=0) == [7, 2, 4, 1, 0, 6, 5, 3]
    assert order(8, seed=42, epoch=1) == [5, 7, 0, 6, 4, 3, 1, 2]


@given(
    st.lists(st.integers(min_value=0, max_value=15), min_size=2, max_size=60),
    st.floats(min_value=0.01, max_value=0.9),
    SEEDS,
    st.booleans(),
)
def test_a_split_has_no_row_on_both_sides_and_loses_none(rows, ratio, seed, shuffle):
    train, validation = split(rows, ratio, seed=seed, shuffle=shuffle)
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(rows)
    assert len(validation) == len(set(validation)) == max(1, round(ratio * len(set(rows))))
    assert Counter(train) == Counter({row: n for row, n in Counter(rows).items() if row not in validation})
    assert (train, validation) == split(rows, ratio, seed=seed, shuffle=shuffle)


@given(st.integers(min_value=0, max_value=60), SEEDS, st.integers(min_value=0, max_value=9))
def test_an_order_visits_every_sample_once(num_samples, seed, epoch):
    assert sorted(order(num_samples, seed=seed, epoch=epoch)) == list(range(num_samples))
    assert order(num_samples, seed=seed, epoch=epoch, shuffle=False) == list(range(num_samples))


def test_epochs_and_seeds_have_their_own_orders():
    orders = {tuple(order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rows.jsonl", DatasetSpec("rows.jsonl")),
        ("a/rows.jsonl#500", DatasetSpec("a/rows.jsonl", 500)),
        ("odd#name.jsonl#5", DatasetSpec("odd#name.jsonl", 5)),
    ],
)
def test_specs(text, expected):
    spec = parse_spec(text)
    assert isinstance(spec, DatasetSpec)
    assert (str(spec.path), spec.num_rows) == (str(expected.path), expected.num_rows)


@pytest.mark.parametrize(
    "text", ["", "  ", "#5", "rows#", "rows#0", "rows#-1", "rows#1.5", "rows#ten", "rows#٣", "rows#+5"]
)
def test_specs_that_are_wrong(text):
    assert isinstance(parse_spec(text), str)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0.05, 20)), min_size=1, max_size=5),
    st.booleans(),
)
def test_shares_are_in_the_ratio_of_their_weights(sources, until_all):
    sizes, weights = zip(*sources, strict=True)
    counts = shares(sizes, weights, until_all=until_all)
    wanted = (max if until_all else min)(size / weight for size, weight in sources)
    for count, size, weight in zip(counts, sizes, weights, strict=True):
        assert count >= size if until_all else count <= size
        assert abs(count - wanted * weight) <= 1


def test_shares_of_known_sizes():
    assert shares([300, 300], [3, 1]) == [300, 100]
    assert shares([300, 300], [3, 1], until_all=True) == [900, 300]
    assert shares([100, 50, 10], [0.1, 0.2, 0.7]) == [1, 2, 10]
