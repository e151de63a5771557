"""Which checkpoints of a run stay on disk, and how the others go. No torch here.

A checkpoint is removed by renaming its folder first: what a crash leaves behind can't be taken for a checkpoint, and is
cleared at the next start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mcore.errors import CheckpointError
from mcore.folders import fsync_path, remove_unwritten, write_durably
from mcore.select import (
    TRACKER,
    Iteration,
    completeness_problems,
    is_complete,
    iteration_dir,
    iterations_in,
    select_checkpoint,
)

_GOING, _PENDING = ".removed-", ".pending-"


def safetensors_dir(output: Path, iteration: int) -> Path:
    """The Hugging Face folder of a checkpoint's weights, where the run writes one."""
    return output / f"hf_{iteration:07d}"


def pending_dir(output: Path, iteration: int) -> Path:
    """The same folder until the checkpoint that it belongs to is complete."""
    folder = safetensors_dir(output, iteration)
    return folder.with_name(f"{_PENDING}{folder.name}")


def publish(output: Path, iteration: int) -> None:
    """Give the Hugging Face folder of a checkpoint that is complete its name, if there is such a folder."""
    pending, folder = pending_dir(output, iteration), safetensors_dir(output, iteration)
    if pending.exists():
        if folder.exists():
            _remove(folder)
        pending.rename(folder)
        fsync_path(output)


def remove_iteration(output: Path, iteration: int) -> None:
    """Remove one checkpoint, in either shape; each is gone in one step."""
    for folder in (iteration_dir(output, iteration), safetensors_dir(output, iteration)):
        if folder.exists():
            _remove(folder)


def _remove(folder: Path) -> None:
    going = folder.with_name(f"{_GOING}{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    fsync_path(folder.parent)
    shutil.rmtree(going)


def remove_unfinished(output: Path) -> list[int]:
    """Clear what a killed run left, half written or half removed. Returns the iterations that are not complete."""
    remove_unwritten(output)
    for pattern in (f"{_GOING}*", f"{_PENDING}*", f".{_PENDING}*.partial", ".hf_*.partial"):
        for left in output.glob(pattern):
            shutil.rmtree(left)
    unfinished = [
        iteration for iteration in iterations_in(output) if completeness_problems(iteration_dir(output, iteration))
    ]
    for iteration in unfinished:
        remove_iteration(output, iteration)
    for folder in output.glob("hf_*"):
        if not iteration_dir(output, int(folder.name.removeprefix("hf_"))).exists():
            _remove(folder)
    return unfinished


def prune(output: Path, *, save_steps: int, train_iters: int, save_total_limit: int | None) -> list[int]:
    """Remove checkpoints that a new, complete one has made superfluous. Returns their iterations.

    The newest, the newest on the run's schedule and the best (lowest validation loss) always stay. Those off schedule,
    saved because the run was asked to stop there, go first and do not count: so an interrupted run ends with the same
    checkpoints as an undisturbed one, and goes back to the same where it has to.

    Args:
        output: The run's folder.
        save_steps: Steps between two scheduled checkpoints.
        train_iters: The last step; its checkpoint is on schedule.
        save_total_limit: Complete checkpoints that stay; None for all on schedule.
    """
    kept = _complete(output)
    off_schedule = [iteration for iteration in kept[:-1] if not _is_due(iteration, save_steps, train_iters)]
    for iteration in off_schedule:
        remove_iteration(output, iteration)
    if save_total_limit is None:
        return off_schedule
    due = [iteration for iteration in kept if _is_due(iteration, save_steps, train_iters)]
    spare = [iteration for iteration in due[:-1] if iteration != _best(output)]
    superfluous = spare[: max(0, len(due) - save_total_limit)]
    for iteration in superfluous:
        remove_iteration(output, iteration)
    return sorted(off_schedule + superfluous)


def go_back(output: Path, *, save_steps: int, train_iters: int) -> int | None:
    """Make the newest checkpoint on schedule the newest of all. Returns its iteration; None if there is none.

    Those behind it were saved because the run was asked to stop; an undisturbed run does not have them.
    """
    complete = _complete(output)
    due = [iteration for iteration in complete if _is_due(iteration, save_steps, train_iters)]
    if not due:
        return None
    write_durably(output / TRACKER, str(due[-1]))
    for iteration in complete[complete.index(due[-1]) + 1 :]:
        remove_iteration(output, iteration)
    return due[-1]


def _complete(output: Path) -> list[int]:
    return [iteration for iteration in iterations_in(output) if is_complete(iteration_dir(output, iteration))]


def _is_due(iteration: int, save_steps: int, train_iters: int) -> bool:
    return iteration % save_steps == 0 or iteration == train_iters


def _best(output: Path) -> Iteration | None:
    try:
        return select_checkpoint(output, "best").iteration
    except CheckpointError:  # none of them was validated
        return None
