from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcore.metrics import read_metrics
from mcore.train.metrics import Step, TrainingLog, mfu


def step(iteration: int, loss: float = 2.0) -> Step:
    return Step(iteration=iteration, loss=loss, grad_norm=1.0, lr=1e-4, step_time_s=0.5, tokens=100, flops=1e9)


def log(output: Path, iteration: int = -1, consumed_tokens: int = 0, logging_steps: int = 1) -> TrainingLog:
    return TrainingLog(
        output,
        iteration=iteration,
        consumed_tokens=consumed_tokens,
        logging_steps=logging_steps,
        world_size=1,
    )


def test_a_record_says_what_the_contract_says(tmp_path: Path) -> None:
    records = log(tmp_path)
    records.step(step(1), consumed_samples=8, last=False)
    records.validation(1, 1.5)
    training, validation = read_metrics(tmp_path / "metrics.jsonl")
    assert validation == {"iteration": 1, "validation_loss": 1.5}
    assert training.keys() == {
        "iteration", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s", "mfu", "memory_gib", "consumed_samples",
        "consumed_tokens", "time",
    }  # fmt: skip
    assert (training["consumed_samples"], training["consumed_tokens"], training["tokens_per_s"]) == (8, 100, 200.0)
    assert 0.05 < training["memory_gib"] < 50


def test_the_load_of_experts_is_recorded_by_layer(tmp_path: Path) -> None:
    records = log(tmp_path)
    records.step(replace(step(1), expert_tokens=[[3, 5, 0, 0], [2, 2, 2, 2]]), consumed_samples=8, last=True)
    records.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["expert_tokens"] == [[3, 5, 0, 0], [2, 2, 2, 2]]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    busiest = [board.Scalars(f"expert_load/busiest_of_layer_{layer}")[0].value for layer in (0, 1)]
    assert busiest == [2.5, 1.0]


def test_records_come_every_few_steps_and_at_the_last(tmp_path: Path) -> None:
    records = log(tmp_path, logging_steps=3)
    for iteration in range(1, 9):
        records.step(step(iteration), consumed_samples=8 * iteration, last=iteration == 8)
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6, 8]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["consumed_tokens"] == 800


def test_a_resumed_log_goes_on_behind_its_checkpoint(tmp_path: Path) -> None:
    first = log(tmp_path)
    for iteration in range(1, 5):
        first.step(step(iteration, loss=9.0), consumed_samples=8 * iteration, last=False)
        first.validation(iteration, 9.0)
    first.close()
    resumed = log(tmp_path, iteration=2, consumed_tokens=200)
    for iteration in range(3, 6):
        resumed.step(step(iteration, loss=1.0), consumed_samples=8 * iteration, last=iteration == 5)
    resumed.close()
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert [(record["iteration"], record["loss"]) for record in records] == [(1, 9), (2, 9), (3, 1), (4, 1), (5, 1)]
    assert records[-1]["consumed_tokens"] == 500
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 9), (2, 9), (3, 1), (4, 1), (5, 1)]
    assert [event.step for event in board.Scalars("validation_loss")] == [1, 2]


def test_a_run_that_starts_anew_drops_the_records_of_one_that_never_saved(tmp_path: Path) -> None:
    log(tmp_path).validation(0, 5.0)
    log(tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_summary_is_a_flat_list_of_figures(tmp_path: Path) -> None:
    records = log(tmp_path)
    records.validation(0, 3.0)
    for iteration, loss in ((1, 2.5), (2, 2.0)):
        records.step(step(iteration, loss), consumed_samples=8 * iteration, last=iteration == 2)
        records.validation(iteration, loss - 0.5 if iteration == 1 else 2.2)
    records.summarise()
    summary = json.loads((tmp_path / "metrics.json").read_text())
    seconds = summary.pop("seconds")
    assert 0 <= seconds < 60
    assert summary == {
        "iterations": 2,
        "tokens": 200,
        "final_loss": 2.0,
        "first_validation_loss": 3.0,
        "last_validation_loss": 2.2,
        "best_validation_loss": 2.0,
        "tokens_per_s": 200.0,
    }


def test_a_cpu_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert mfu(1e12, 1.0, 1) is None


@pytest.mark.parametrize(("device", "expected"), [("NVIDIA H100 80GB HBM3", 0.25), ("NVIDIA GeForce RTX 3060", None)])
def test_mfu_is_a_share_of_the_devices_peak(monkeypatch: pytest.MonkeyPatch, device: str, expected: float) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert mfu(989e12, 2.0, 2) == expected
