"""How far training is, by what it has written so far."""

import json
from pathlib import Path

import pytest

from mcore.training_state import latest_step, planned_iterations


def test_the_last_step_counts_not_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert latest_step(path) is None
    lines = [{"iteration": number, "loss": 1.0 / number} for number in range(1, 2000)]
    lines.append({"iteration": 1999, "validation_loss": 0.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 2000, "lo')
    assert latest_step(path) == {"iteration": 1999, "loss": 1.0 / 1999}


@pytest.mark.parametrize("text", ["", "{}", '{"train": {}}', "[1]"])
def test_planned_iterations_are_none_until_they_are_written(tmp_path: Path, text: str) -> None:
    assert planned_iterations(tmp_path) is None
    (tmp_path / "fingerprint.json").write_text(text)
    assert planned_iterations(tmp_path) is None
    (tmp_path / "fingerprint.json").write_text('{"train": {"train_iters": 24}}')
    assert planned_iterations(tmp_path) == 24
