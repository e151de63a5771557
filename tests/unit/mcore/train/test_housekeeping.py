from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore.metrics import append_metrics
from mcore.select import iteration_dir, iterations_in
from mcore.train.housekeeping import prune, remove_unfinished, safetensors_dir

Save = Callable[..., None]


@pytest.fixture
def save(base: Path, tmp_path: Path) -> Save:
    """Put a complete checkpoint of an iteration into the output folder, with a validation loss if one is given."""

    def save(iteration: int, validation_loss: float | None = None) -> None:
        shutil.copytree(base / "release", iteration_dir(tmp_path, iteration))
        if validation_loss is not None:
            append_metrics(tmp_path / "metrics.jsonl", {"iteration": iteration, "validation_loss": validation_loss})

    return save


def run_of(save: Save, output: Path, losses: dict[int, float | None], limit: int | None) -> list[int]:
    """Save and prune in turn, as a run does; the iterations that are left."""
    for iteration, loss in losses.items():
        save(iteration, loss)
        prune(output, save_steps=10, train_iters=max(losses), save_total_limit=limit)
    return iterations_in(output)


@pytest.mark.parametrize(
    ("losses", "limit", "left"),
    [
        ({10: 3.0, 20: 2.0, 30: 2.5, 40: 2.6}, 2, [20, 40]),  # the best and the last
        ({10: 1.0, 20: 2.0, 30: 2.5, 40: 2.6}, 3, [10, 30, 40]),  # the oldest is the best
        ({10: 4.0, 20: 3.0, 30: 2.0, 40: 1.0}, 2, [30, 40]),  # the last is the best
        ({10: None, 20: None, 30: None, 40: None}, 2, [30, 40]),  # never validated
        ({10: 2.0, 20: 1.0, 30: 2.0, 35: 2.0}, 2, [20, 35]),  # the last step is off the steps, and stays
        ({10: 3.0, 20: 2.0, 30: 2.5, 40: 2.6}, None, [10, 20, 30, 40]),
    ],
)
def test_best_and_last_stay(
    save: Save, tmp_path: Path, losses: dict[int, float | None], limit: int | None, left: list[int]
) -> None:
    assert run_of(save, tmp_path, losses, limit) == left


def test_the_hugging_face_folder_of_a_checkpoint_goes_with_it(save: Save, tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        save(iteration)
        safetensors_dir(tmp_path, iteration).mkdir()
    prune(tmp_path, save_steps=10, train_iters=100, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("hf_*")) == ["hf_0000020", "hf_0000030"]


def test_hugging_face_folders_that_a_killed_run_left_are_cleared(save: Save, tmp_path: Path) -> None:
    save(10)
    for name in ("hf_0000010", "hf_0000020", ".hf_0000030.partial", ".removed-hf_0000005", "hf"):
        (tmp_path / name).mkdir()
    assert remove_unfinished(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf_0000010", "iter_0000010"]


def test_nothing_is_removed_for_a_checkpoint_that_is_not_complete(save: Save, tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        save(iteration)
    next(iteration_dir(tmp_path, 30).glob("*.distcp")).unlink()
    assert prune(tmp_path, save_steps=10, train_iters=100, save_total_limit=2) == []
    assert iterations_in(tmp_path) == [10, 20, 30]


def test_a_checkpoint_of_a_stopped_run_goes_once_the_next_is_there(save: Save, tmp_path: Path) -> None:
    save(10)
    save(13, validation_loss=0.1)  # even if it is the best: an undisturbed run would not have it
    assert prune(tmp_path, save_steps=10, train_iters=40, save_total_limit=None) == []
    save(20)
    assert prune(tmp_path, save_steps=10, train_iters=40, save_total_limit=None) == [13]
    assert iterations_in(tmp_path) == [10, 20]


def test_what_a_killed_run_left_is_cleared(save: Save, tmp_path: Path) -> None:
    save(10)
    save(20)
    (iteration_dir(tmp_path, 20) / "metadata.json").unlink()
    shutil.copytree(iteration_dir(tmp_path, 10), tmp_path / ".removed-iter_0000005")
    assert remove_unfinished(tmp_path) == [20]
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000010"]
