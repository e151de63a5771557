"""Training that saves and leaves is started again, as often as it comes further. The commands are small and real."""

import sys
from pathlib import Path

import pytest

from configs.schema.run import RunConfig
from mcore.errors import LaunchError, TrainingError
from tasks.stage import Job
from tasks.train import launch_until_complete

RUN = {"name": "stops", "model": {"source": "m"}, "data": {"dataset": ["d.jsonl"]}, "train": {"train_iters": 10}}
STOP_AT = """
import pathlib, sys
output, iterations = pathlib.Path(sys.argv[1]), sys.argv[2:]
starts = output / "starts"
number = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(number + 1))
if number == len(iterations):
    sys.exit(0)
if iterations[number] == "fails":
    sys.exit(1)
(output / "latest_checkpointed_iteration.txt").write_text(iterations[number])
sys.exit(75)
"""
"""Saves the next of the iterations that it is given at each start and leaves; it is complete when none is left."""


def train(folder: Path, *iterations: str) -> tuple[int, list[str]]:
    """How often the command was started, and what the flow was told."""
    told: list[str] = []
    output = folder / "output"
    output.mkdir()
    job = Job(
        run=RunConfig.model_validate(RUN),
        name="train",
        ingredients={},
        output=output,
        stage_dir=folder / "stage",
        lease=None,
        interpreter=sys.executable,
        say=told.append,
    )
    try:
        launch_until_complete(job, [sys.executable, "-S", "-c", STOP_AT, str(output), *iterations])
    finally:
        (folder / "count").write_text((output / "starts").read_text())
    return int((output / "starts").read_text()), told


def test_it_is_started_until_it_is_complete_and_uses_up_no_retry(tmp_path):
    starts, told = train(tmp_path, "3", "5", "9", "10")
    assert starts == 5
    assert len([line for line in told if line.endswith("training is started again")]) == 4


def test_without_progress_between_two_stops_it_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="no progress") as caught:
        train(tmp_path, "3", "5", "5", "7")
    assert "iteration 5 again" in str(caught.value)
    assert (tmp_path / "count").read_text() == "3"


def test_what_fails_otherwise_is_not_started_again(tmp_path):
    with pytest.raises(LaunchError):
        train(tmp_path, "3", "fails", "5")
    assert (tmp_path / "count").read_text() == "2"
