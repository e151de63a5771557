"""The planner's layouts are those that a run may have, and its times follow from sizes as documented."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.layouts import best
from benchmarks.train_cases import SHAPES
from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.bridge.families import dims_of
from mcore.train.flops import ModelFlops
from mcore.train.planner import Candidate, Machine, rank_layouts

TINY = SHAPES["tiny"]
ROW = 64


def ranked(shape: str = "tiny", *, machine: Machine, top: int | None = None, **settings: Any) -> list[Candidate]:
    config = TrainConfig(**{"method": "pt", "train_iters": 9, "global_batch_size": 16, **settings})
    padded = dims_of(SHAPES[shape], make_vocab_size_divisible_by=128).padded_vocab
    return rank_layouts(config, SHAPES[shape], machine, row_tokens=ROW, padded_vocab_size=padded, top=top)


@pytest.fixture(scope="module")
def on_four() -> list[Candidate]:
    return ranked(machine=Machine(num_gpus=4))


def test_every_layout_is_one_that_a_run_may_have(on_four: list[Candidate]) -> None:
    layouts = [Layout.of(one.config) for one in on_four]
    for layout, one in zip(layouts, on_four, strict=True):
        assert layout.process_problems(4) == []
        assert layout.problems(TINY, padded_vocab_size=256, seq_length=ROW) == []
        assert 16 % (one.config.micro_batch_size * 4 // layout.model_parallel_size) == 0
    # Two key-value heads and two layers: no TP of 4, no PP of 4, no two parts of a stage.
    sizes = {(one.tensor_model_parallel_size, one.pipeline_model_parallel_size) for one in layouts}
    assert sizes == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert {one.context_parallel_size for one in layouts} == {1, 2, 4}


def test_the_fastest_comes_first_and_nothing_is_over_the_memory(on_four: list[Candidate]) -> None:
    times = [one.time.total for one in on_four]
    assert times == sorted(times) and times[0] > 0
    least = min(one.memory_gib for one in on_four)
    limit = (least + max(one.memory_gib for one in on_four)) / 2
    fitting = ranked(machine=Machine(num_gpus=4, memory_gib=limit))
    assert fitting == [one for one in on_four if one.memory_gib <= limit] and len(fitting) < len(on_four)
    assert ranked(machine=Machine(num_gpus=4, memory_gib=least / 2)) == []
    assert ranked(machine=Machine(num_gpus=4), top=3) == on_four[:3]


def found(candidates: list[Candidate], **fields: Any) -> Candidate:
    wanted = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "micro_batch_size": 1, "recompute_granularity": "none", **fields,
    }  # fmt: skip
    return next(one for one in candidates if all(getattr(one.config, name) == of for name, of in wanted.items()))


def test_times_follow_from_sizes(on_four: list[Candidate]) -> None:
    machine, a, hidden, layers = Machine(num_gpus=4), 2, 64, 2
    flops = ModelFlops.of(TINY).of_step([ROW] * 16, ROW * 16)
    plain = found(on_four)
    assert plain.time.compute == pytest.approx(flops / (4 * machine.peak_flops * machine.mfu))
    parameters = 256 * hidden + layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64 + 64 + 2 * 32) + hidden
    # Gradients of 4 bytes are summed and weights of 2 gathered: each process gets three quarters from the others.
    assert plain.time.data == pytest.approx(3 / 4 * 6 * parameters / machine.link_bytes_per_s)
    assert plain.time.optimizer == pytest.approx((6 + 2 * 12) * parameters / 4 / machine.memory_bytes_per_s)
    assert plain.time.bubble == plain.time.tensor == plain.time.context == plain.time.pipeline == 0
    tensor = found(on_four, tensor_model_parallel_size=2)
    # Eight micro-batches, two halves of two layers, five gathers or sums of each, of which half comes from the other.
    sent = 8 * 2 * layers * 5 / 2 * ROW * hidden * a
    assert tensor.time.tensor == pytest.approx(sent / machine.link_bytes_per_s)
    context = found(on_four, context_parallel_size=2)
    assert context.time.context == pytest.approx(8 * layers * 3 / 2 * 2 * 32 * a * ROW / machine.link_bytes_per_s)
    pipeline = found(on_four, pipeline_model_parallel_size=2)
    output = 6 * 256 * hidden * ROW * 16 / flops
    waiting = plain.time.compute * ((1 + output) * (1 + 1 / 8) - 1)
    assert pipeline.time.bubble == pytest.approx(waiting)
    again = found(on_four, recompute_granularity="full")
    forward = (flops - 6 * 256 * hidden * ROW * 16) / 3
    assert again.time.compute == pytest.approx(plain.time.compute * (1 + forward / flops))
    assert plain.mfu == pytest.approx(flops / (plain.time.total * 4 * machine.peak_flops))


def test_a_faster_link_favours_what_sends_more() -> None:
    machine = Machine(num_gpus=2)
    slow = ranked(machine=replace(machine, link_bytes_per_s=1e6), top=1)[0]
    fast = ranked(machine=replace(machine, link_bytes_per_s=1e15), top=1)[0]
    assert slow.time.total > 10 * fast.time.total


def test_large_models_are_divided_as_far_as_memory_asks() -> None:
    alone = best("7b", 2)
    assert alone is not None and alone.config.recompute_granularity == "none" and 100 < alone.memory_gib <= 141
    divided = best("14b", 2)
    assert divided is not None and Layout.of(divided.config).model_parallel_size == 2
    assert best("30b-a3b", 2) is None  # 16 bytes of each of 30.5e9 parameters are more than both have
