"""Choice of a training checkpoint, without torch: what is not complete on disk is never chosen.

A checkpoint folder holds `latest_checkpointed_iteration.txt` (an integer, or `release` for a converted base) and
`iter_0000100/` or `release/` in megatron-core's `torch_dist` format. The tracker alone proves nothing: it may be ahead
of the data, point at a deleted folder, or hold garbage.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mcore.errors import CheckpointError, Problem
from mcore.metrics import FILE_NAME as METRICS_FILE
from mcore.metrics import read_metrics

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
Iteration = int | Literal["release"]


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen checkpoint: its iteration, its folder, and why it was chosen."""

    iteration: Iteration
    path: Path
    reason: str


def iteration_dir(checkpoint: Path, iteration: Iteration) -> Path:
    """Folder of one iteration, spelt as Megatron does."""
    return checkpoint / (RELEASE if iteration == RELEASE else f"iter_{iteration:07d}")


def iterations_in(checkpoint: Path) -> list[int]:
    """Iterations that have a folder, complete or not, ascending."""
    found = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in checkpoint.glob("iter_*"))
    return sorted(int(match[1]) for match in found if match)


def read_tracker(checkpoint: Path) -> Iteration | None:
    """What the tracker says; None if it is missing or holds neither a number nor `release`."""
    try:
        text = (checkpoint / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == RELEASE:
        return RELEASE
    return int(text) if re.fullmatch(r"\d{1,12}", text) else None


class _Inert:
    """Stands for any class in a `.metadata` pickle: keeps the state, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        # Classes with __slots__ pickle a (dict, slots) pair, the others a dict.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("inert")

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {})


def shard_lengths(iteration_folder: Path) -> dict[str, int]:
    """Bytes that each `.distcp` file must at least have, by the checkpoint's own `.metadata`.

    No class of the pickle is imported and nothing in it is run.

    Raises:
        CheckpointError: `.metadata` is missing or can't be parsed.
    """
    path = iteration_folder / ".metadata"
    try:
        metadata = _InertUnpickler(io.BytesIO(path.read_bytes())).load()
        lengths: dict[str, int] = {}
        for storage in metadata.storage_data.values():
            end = storage.offset + storage.length
            lengths[storage.relative_path] = max(lengths.get(storage.relative_path, 0), end)
    except OSError as exc:
        raise CheckpointError(
            f"{iteration_folder.name} is not complete", [Problem(str(path), found="no such file")]
        ) from exc
    except Exception as exc:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{iteration_folder.name} is damaged", [Problem(str(path), "a torch DCP metadata file", repr(exc))]
        ) from exc
    return lengths


def completeness_problems(iteration_folder: Path) -> list[Problem]:
    """Everything that keeps a checkpoint folder from being complete; an empty list if it can be loaded."""
    if not iteration_folder.is_dir():
        return [Problem(str(iteration_folder), "a checkpoint folder", "none")]
    problems = []
    marker = iteration_folder / "metadata.json"  # written by megatron-core after all shards
    try:
        if json.loads(marker.read_text()).get("sharded_backend") != "torch_dist":
            problems.append(Problem(str(marker), "sharded_backend torch_dist"))
    except (OSError, ValueError, AttributeError) as exc:
        problems.append(Problem(str(marker), "megatron-core's metadata.json", type(exc).__name__))
    try:
        lengths = shard_lengths(iteration_folder)
    except CheckpointError as exc:
        return [*problems, *exc.problems]
    for name, length in sorted(lengths.items()):
        shard = iteration_folder / name
        size = shard.stat().st_size if shard.is_file() else None
        if size is None or size < length:
            problems.append(Problem(str(shard), f"{length} bytes", "no file" if size is None else f"{size} bytes"))
    return problems


def is_complete(iteration_folder: Path) -> bool:
    """Whether every shard of the checkpoint is there at full length."""
    return not completeness_problems(iteration_folder)


def select_checkpoint(
    checkpoint: Path, strategy: Literal["latest", "best", "iteration"] = "latest", iteration: int | None = None
) -> Selection:
    """Choose a complete checkpoint.

    `latest` follows the tracker; if it can't be trusted, the newest complete iteration is taken and the reason says so.
    `best` takes the complete iteration with the lowest validation loss of `metrics.jsonl` beside it.

    Args:
        checkpoint: Folder with the tracker.
        strategy: How to choose.
        iteration: The iteration, with strategy `iteration`.

    Raises:
        CheckpointError: There is no complete checkpoint that fits. Names every candidate and what is wrong with it.
    """
    if strategy == "iteration":
        if iteration is None:
            raise CheckpointError("no iteration was named", ["strategy 'iteration' needs one"])
        return _only_if_complete(checkpoint, iteration, f"iteration {iteration} was asked for")
    if strategy == "best":
        return _best(checkpoint)
    return _latest(checkpoint)


def _only_if_complete(checkpoint: Path, iteration: Iteration, reason: str) -> Selection:
    folder = iteration_dir(checkpoint, iteration)
    problems = completeness_problems(folder)
    if problems:
        raise CheckpointError(f"checkpoint {iteration} of {checkpoint} can't be used", problems)
    return Selection(iteration, folder, reason)


def _latest(checkpoint: Path) -> Selection:
    tracked = read_tracker(checkpoint)
    if tracked is not None and is_complete(iteration_dir(checkpoint, tracked)):
        return Selection(tracked, iteration_dir(checkpoint, tracked), f"{TRACKER} says {tracked}")
    why = (
        f"{TRACKER} is missing or unreadable" if tracked is None else f"{TRACKER} says {tracked}, which is not complete"
    )
    problems = [Problem(why)]
    for candidate in reversed(iterations_in(checkpoint)):
        found = completeness_problems(iteration_dir(checkpoint, candidate))
        if not found:
            return Selection(
                candidate, iteration_dir(checkpoint, candidate), f"{why}; newest complete one is {candidate}"
            )
        problems += found
    raise CheckpointError(f"{checkpoint} has no complete checkpoint", problems)


def _best(checkpoint: Path) -> Selection:
    losses = {
        record["iteration"]: record["validation_loss"]
        for record in read_metrics(checkpoint / METRICS_FILE)
        if record.get("validation_loss") is not None
    }
    saved = [iteration for iteration in iterations_in(checkpoint) if iteration in losses]
    complete = [iteration for iteration in saved if is_complete(iteration_dir(checkpoint, iteration))]
    if not complete:
        raise CheckpointError(
            f"{checkpoint} has no complete checkpoint with a validation loss",
            [
                Problem(
                    "strategy 'best'",
                    "a saved iteration with a validation loss",
                    f"saved {iterations_in(checkpoint)}, validated {sorted(losses)}",
                    "Make eval_steps a divisor of save_steps, or select by 'latest'.",
                )
            ],
        )
    best = min(complete, key=lambda candidate: (losses[candidate], candidate))
    return Selection(
        best, iteration_dir(checkpoint, best), f"lowest validation loss {losses[best]:.4f} of {len(complete)}"
    )
