"""Adam's state in checkpoints: whole behind padded buckets, and compared number by number when it is loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.dist_files import read_dist_tensors
from mcore.errors import SavingError
from mcore.select import iteration_dir
from mcore.train import adam, checkpoint, model, moments
from mcore.train.base import open_base
from mcore.train.model import Training, build_training
from mcore.train.moments import parts_of, refuse_other_moments
from mcore.train.position import Position
from mcore.train.run import train
from mcore.train.schedule import Schedule
from tests.tiny_runs import tiny_run

STEPS = 4
MANY_BUCKETS = partial(DistributedDataParallelConfig, bucket_size=1000)
"""Buckets of a few parameters each, padded at their ends to 128 numbers."""


def settings(**options: Any) -> dict[str, Any]:
    return {"train_iters": STEPS, "save_steps": 2, "eval_steps": 100} | options


def loaded(folder: Path, base: Path, output: Path, **options: Any) -> Training:
    """The training of a run with its last checkpoint in it; process groups must be there."""
    run = tiny_run(folder, **settings(**options))
    start = open_base(base, run)
    training = build_training(run.train, Schedule(STEPS, 3), start, Layout(), has_weights=False)
    checkpoint.load(iteration_dir(output, STEPS), training, Layout())
    return training


def distributed(training: Training) -> DistributedOptimizer:
    (part,) = parts_of(training.optimizer)
    assert isinstance(part, DistributedOptimizer)
    return part


def is_padded(part: DistributedOptimizer) -> bool:
    (buffer,) = part.buffers
    return len(buffer.buckets) > 3 and any(end > buffer.numel_unpadded for _, end, _ in buffer.param_index_map.values())


@pytest.mark.parametrize("options", [{}, {"torch_dtype": "bfloat16"}])
def test_moments_behind_padded_buckets_are_saved_as_they_are(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(model, "DistributedDataParallelConfig", MANY_BUCKETS)
    run = tiny_run(tmp_path, **settings(overlap_grad_reduce=True, **options))
    with parallel_processes(Layout()):
        training = build_training(run.train, Schedule(STEPS, 3), open_base(base, run), Layout(), has_weights=True)
        part = distributed(training)
        assert is_padded(part)
        adam.prime(training.optimizer)
        for state in part.optimizer.state.values():
            state["step"] += STEPS
            for name in moments.MOMENTS:
                state[name].normal_()
        position = Position(iteration=STEPS)
        checkpoint.begin(tmp_path / "run", training, position, Layout(), {}).finish()
        folder = iteration_dir(tmp_path / "run", STEPS)
        refuse_other_moments(training, folder, read_dist_tensors(folder), updates=STEPS)


def test_numbers_that_megatron_loses_are_missed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core, left to itself, fills the ends of moments with zeros."""
    monkeypatch.setattr(model, "DistributedDataParallelConfig", MANY_BUCKETS)
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **settings(overlap_grad_reduce=True)), base, tmp_path / "run")
        training = loaded(tmp_path, base, tmp_path / "run", overlap_grad_reduce=True)
        part = distributed(training)
        state = part.sharded_param_state_fully_reshardable(
            training.sharded_weights(), metadata=dict(checkpoint.OPTIMIZER_FORMAT)
        )
        lost = moments._lost_numbers(part, state)
        assert {problem.subject for problem in lost} >= {"optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"}


@pytest.mark.parametrize("name", ["param", "exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("options", [{}, {"use_distributed_optimizer": False}])
def test_one_number_that_is_not_the_checkpoints_is_named(
    tmp_path: Path, base: Path, name: str, options: dict[str, Any]
) -> None:
    if name == "param" and options:
        pytest.skip("an optimizer that is whole keeps no copy of fp32 weights")
    output = tmp_path / "run"
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **settings(**options)), base, output)
        training = loaded(tmp_path, base, output, **options)
        stored = read_dist_tensors(iteration_dir(output, STEPS))
        compare = partial(refuse_other_moments, training, iteration_dir(output, STEPS), stored)
        compare(updates=STEPS)
        (part,) = parts_of(training.optimizer)
        *_, (parameter, _, state) = list(moments._held(part))
        with torch.no_grad():
            state[name].view(-1)[-1] += 1.0
        with pytest.raises(SavingError) as caught:
            compare(updates=STEPS)
        (problem,) = caught.value.problems
        assert problem.subject.startswith(f"optimizer.state.{name}.")
        assert name == "step" or f"{parameter.numel() - 1} of them the same" in problem.found
