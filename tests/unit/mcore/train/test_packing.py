from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.run import RunConfig
from configs.schema.train import TrainConfig
from mcore.train.packing import pack, rows_of_rank
from mcore.train.packing_options import packing_problems
from tests.tiny_models import tiny_hf_model

SIZES = st.lists(st.integers(1, 40), min_size=0, max_size=40)


@given(SIZES, st.integers(40, 120), st.integers(1, 4), st.integers(1, 3))
def test_every_sample_is_in_one_row_of_one_rank(sizes: list[int], capacity: int, num_ranks: int, count: int) -> None:
    costs = [size + size * size / 7 for size in sizes]
    rows = pack(sizes, costs, capacity, num_ranks * count)
    of_ranks = [rows_of_rank(rows, costs, num_ranks, rank) for rank in range(num_ranks)]
    assert {len(of_rank) for of_rank in of_ranks} == {len(rows) // num_ranks}  # or a collective would wait forever
    assert len(of_ranks[0]) % count == 0
    assert all(sum(sizes[place] for place in row) <= capacity for row in rows)
    places = [place for of_rank in of_ranks for row in of_rank for place in row]
    assert sorted(places) == list(range(len(sizes)))
    assert pack(sizes, costs, capacity, num_ranks * count) == rows


@given(SIZES, st.integers(40, 120), st.integers(1, 4))
def test_there_are_few_rows_and_none_is_half_empty_beside_another(
    sizes: list[int], capacity: int, multiple: int
) -> None:
    num_rows = len(pack(sizes, [float(size) for size in sizes], capacity, multiple))
    fewest = max(1, -(-sum(sizes) // capacity))
    assert fewest <= num_rows
    # Of two rows that best fit decreasing leaves, the tokens are more than one holds.
    assert num_rows < 2 * fewest + 2 * multiple


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 4))
def test_rows_differ_by_no_more_than_a_sample(sizes: list[int], num_rows: int) -> None:
    costs = [float(size * size) for size in sizes]
    loads = [sum(costs[place] for place in row) for row in pack(sizes, costs, sum(sizes), num_rows)]
    assert max(loads) - min(loads) <= max(costs)


def test_the_costly_meet_at_once_and_no_rank_gets_them_all() -> None:
    costs = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    rows = [[place] for place in range(6)]
    assert [rows_of_rank(rows, costs, 2, rank) for rank in (0, 1)] == [[[0], [3], [4]], [[1], [2], [5]]]


def test_where_dealing_by_cost_leaves_one_over_the_best_fit_does_not() -> None:
    sizes = [6, 5, 5, 4]
    # By cost, the least loaded first: 6 and 5, then 5 beside 5, then 4 beside 6. Of other costs, 6 and 5 share no room.
    assert sorted(map(sorted, pack(sizes, [1.0, 9.0, 1.0, 1.0], 10))) == [[0, 3], [1, 2]]
    assert sorted(map(sorted, pack(sizes, [6.0, 5.0, 5.0, 4.0], 10))) == [[0, 3], [1, 2]]


def test_where_two_rows_do_not_do_there_are_more() -> None:
    assert sorted(pack([6, 6, 6], [1.0] * 3, 10)) == [[0], [1], [2]]
    assert sorted(map(len, pack([6, 6, 6], [1.0] * 3, 10, 2))) == [0, 1, 1, 1]


RUN = {
    "name": "run",
    "model": {"source": "model"},
    "data": {"dataset": ["rows.jsonl"], "max_length": 64},
    "train": {"train_iters": 1},
}


def test_samples_are_packed_unless_a_run_says_otherwise() -> None:
    def length(**train: object) -> int | None:
        return RunConfig.model_validate(RUN | {"train": {"train_iters": 1} | train}).packing_length

    assert length() == 64
    assert length(packing_length=100) == 100
    assert length(packing=False) is None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"packing_length": 63}, r"train.packing_length \(63\) must be at least data.max_length \(64\)"),
        ({"packing_length": 64, "packing": False}, "packing_length needs packing: true"),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
            "seq_aux_loss needs packing: false",
        ),
    ],
)
def test_what_packing_can_not_do_is_refused(train: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(RUN | {"train": {"train_iters": 1} | train})


@pytest.mark.parametrize(("name", "longest"), [("phi3_long", 16), ("llama_dynamic", 16)])
def test_frequencies_that_depend_on_the_length_are_refused_where_samples_are_long(name: str, longest: int) -> None:
    _, hf_config = tiny_hf_model(name)
    packed, padded = (TrainConfig(train_iters=1, packing=packing) for packing in (True, False))
    assert packing_problems(packed, hf_config, longest) == []
    assert packing_problems(padded, hf_config, longest + 1) == []
    (problem,) = packing_problems(packed, hf_config, longest + 1)
    assert problem.subject == "train.packing"
    assert f"samples of more than {longest} tokens" in str(problem)


def test_frequencies_of_other_ropes_are_no_problem() -> None:
    for name in ("llama3", "llama_yarn"):
        assert packing_problems(TrainConfig(train_iters=1), tiny_hf_model(name)[1], 10**6) == []
