"""Saves in the background, saves within a time limit, and data that changed between two starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema.run import RunConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.errors import ConfigError, SavingError, StoppedError
from mcore.metrics import read_metrics
from mcore.select import completeness_problems, iteration_dir, iterations_in, read_tracker
from mcore.train import adam, checkpoint
from mcore.train.base import open_base
from mcore.train.model import build_training
from mcore.train.position import Position
from mcore.train.run import train
from mcore.train.schedule import Schedule
from mcore.train.stop import StopRequest, TimeLimit
from tests.tiny_runs import recorded, saved_tensors, tiny_run, write_rows


def trained(run: RunConfig, base: Path, output: Path, stop: StopRequest | None = None) -> Path:
    with parallel_processes(Layout()):
        train(run, base, output, stop)
    return output


def weights(output: Path, iteration: int) -> dict[str, torch.Tensor]:
    return saved_tensors(iteration_dir(output, iteration))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(other[key], tensor) for key, tensor in one.items())


@pytest.mark.parametrize("options", [{}, {"use_distributed_optimizer": False}, {"torch_dtype": "bfloat16"}])
def test_what_is_saved_in_the_background_is_what_was_there_when_it_began(
    tmp_path: Path, base: Path, options: dict[str, Any]
) -> None:
    run = tiny_run(tmp_path, **options)
    with parallel_processes(Layout()):
        training = build_training(run.train, Schedule(4, 3), open_base(base, run), Layout(), has_weights=True)
        adam.prime(training.optimizer)
        at_once, later = tmp_path / "at_once", tmp_path / "later"
        checkpoint.begin(at_once, training, Position(iteration=4), Layout(), {}).finish()
        saving = checkpoint.begin(later, training, Position(iteration=4), Layout(), {}, in_background=True)
        with torch.no_grad():
            for group in training.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.zero_()
            for parameter in training.modules[0].parameters():
                parameter.zero_()
        assert read_tracker(later) is None
        assert completeness_problems(iteration_dir(later, 4))
        saving.finish()
    assert read_tracker(later) == 4
    assert same(weights(at_once, 4), weights(later, 4))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, base: Path) -> None:
    """Neither bits nor what is kept depend on it, and what every step saves is finished before the next is begun."""
    options = {"train_iters": 8, "save_steps": 2, "eval_steps": 2, "save_total_limit": 2, "save_safetensors": True}
    waiting = trained(tiny_run(tmp_path, **options), base, tmp_path / "waiting")
    going_on = trained(tiny_run(tmp_path, **options, async_save=True), base, tmp_path / "going_on")
    assert {path.name for path in waiting.iterdir()} == {path.name for path in going_on.iterdir()}
    for iteration in iterations_in(waiting):
        assert same(weights(waiting, iteration), weights(going_on, iteration))
        one, other = (output / f"hf_{iteration:07d}" / "model.safetensors" for output in (waiting, going_on))
        assert one.read_bytes() == other.read_bytes()
    for figure in ("loss", "validation_loss", "grad_norm", "lr"):
        one, other = (recorded(read_metrics(output / "metrics.jsonl"), figure) for output in (waiting, going_on))
        assert one == other


def test_a_checkpoint_that_can_t_be_written_is_not_announced(tmp_path: Path, base: Path) -> None:
    run = tiny_run(tmp_path)
    with parallel_processes(Layout()):
        training = build_training(run.train, Schedule(4, 3), open_base(base, run), Layout(), has_weights=True)
        adam.prime(training.optimizer)
        output = tmp_path / "run"
        checkpoint.begin(output, training, Position(iteration=1), Layout(), {}).finish()
        # A full disk: what is written to the first shard goes nowhere.
        iteration_dir(output, 2).mkdir()
        begun = checkpoint.Writing

        class OnFullDisk(begun):  # type: ignore[misc, valid-type]
            def __init__(self, request: Any, **options: Any) -> None:
                _, name, data = request.async_fn_args[1][0]
                request.async_fn_args[1][0] = ("/dev/full", name, data)
                super().__init__(request, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "Writing", OnFullDisk)
            saving = checkpoint.begin(output, training, Position(iteration=2), Layout(), {}, in_background=True)
        with pytest.raises(SavingError, match="No space left"):
            saving.finish()
    assert read_tracker(output) == 1
    assert completeness_problems(iteration_dir(output, 2))


def test_a_run_whose_time_is_up_saves_and_goes_on(tmp_path: Path, base: Path) -> None:
    options = {"train_iters": 6, "save_steps": 3}
    straight = trained(tiny_run(tmp_path, **options), base, tmp_path / "straight")
    run, output = tiny_run(tmp_path, **options, exit_duration_in_mins=0.5), tmp_path / "in_turns"
    stops = []
    while len(stops) < 10:
        stop = StopRequest()
        stop.since_s -= 25 if len(stops) < 2 else 0  # long ago, as it would be behind a slow start
        stop.since_s -= 10 if len(stops) < 1 else 0
        try:
            trained(run, base, output, stop)
            break
        except StoppedError as error:
            assert "the time is up" in str(error)
            stops.append(read_tracker(output))
    assert stops[0] == 1 and len(stops) < 10
    assert iterations_in(output) == iterations_in(straight)
    assert all(same(weights(straight, iteration), weights(output, iteration)) for iteration in iterations_in(straight))


def test_a_time_limit_leaves_what_the_longest_step_and_save_took() -> None:
    now = time.monotonic()
    assert not TimeLimit(None, now - 1e9).is_up(1e9)
    assert TimeLimit(1.0, now - 61).is_up(0)
    assert not TimeLimit(1.0, now - 30).is_up(10)
    assert TimeLimit(1.0, now - 30).is_up(31)
    limit = TimeLimit(1.0, now - 59.5)
    assert not limit.is_up(0)
    time.sleep(0.3)
    assert limit.is_up(0)  # 0.2 s are left, and the step took 0.3 s


def test_other_data_are_refused_unless_the_run_says_so(tmp_path: Path, base: Path) -> None:
    output = trained(tiny_run(tmp_path, train_iters=8, save_steps=4), base, tmp_path / "run")
    (output / "metrics.json").unlink()
    for iteration in iterations_in(output)[1:]:
        (iteration_dir(output, iteration) / "metadata.json").unlink()
    write_rows(tmp_path / "train.jsonl", 30, seed=99)
    changed = {"train_iters": 8, "save_steps": 4, "global_batch_size": 4}
    with pytest.raises(ConfigError) as caught:
        trained(tiny_run(tmp_path, **changed), base, output)
    assert [problem.subject for problem in caught.value.problems] == ["data.train", "train.global_batch_size"]
    assert all("train.accept_changed_data" in problem.fix for problem in caught.value.problems)
    with pytest.raises(ConfigError) as caught:
        trained(tiny_run(tmp_path, **changed, accept_changed_data=True, lr=9e-3), base, output)
    assert [problem.subject for problem in caught.value.problems] == ["train.lr"]
    trained(tiny_run(tmp_path, **changed, accept_changed_data=True), base, output)
    records = read_metrics(output / "metrics.jsonl")
    (record,) = (record for record in records if "changed" in record)
    assert record["iteration"] == 4
    assert record["changed"].keys() == {"data.train", "train.global_batch_size"}
    assert record["changed"]["train.global_batch_size"] == [8, 4]
    consumed = {record["iteration"]: record["consumed_samples"] for record in records if "loss" in record}
    assert (consumed[4], consumed[5], consumed[8]) == (32, 36, 48)
    trained(tiny_run(tmp_path, **changed), base, output)  # these are the run's data now
