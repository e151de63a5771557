"""Choice of a training checkpoint, without torch: what is not complete on disk is never chosen.

A checkpoint folder holds `latest_checkpointed_iteration.txt` (an integer, or `release` for a converted base) and
`iter_0000100/` or `release/` in megatron-core's `torch_dist` format. The tracker alone proves nothing: it may be ahead
of the data, point at a deleted folder, or hold garbage.

Complete means: `metadata.json` and `.metadata` parse, `common.pt` is whole by its own checksums, and every shard is
there at full length with each of its pieces framed as torch.save left it. Bits that flip inside a piece are for the
checksums of the artifact store to find.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from mcore.errors import CheckpointError, Problem
from mcore.metrics import FILE_NAME as METRICS_FILE
from mcore.metrics import read_metrics

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
Iteration = int | Literal["release"]

_ZIP_HEAD, _ZIP_TAIL, _ZIP_TAIL_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
"""First bytes of a zip archive, and first bytes of the record of 22 bytes that ends it."""


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
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where one tensor or object lies: bytes `offset` to `offset + length` of a shard."""

    shard: str
    offset: int
    length: int
    is_plain: bool  # as torch.save wrote it, not compressed or otherwise transformed


class _Inert:
    """Stands for any class or function in a `.metadata` pickle: keeps the state, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Classes with __slots__ pickle a (dict, slots) pair, the others a dict.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item of a mapping that is no plain dict, and forget it."""

    def append(self, item: Any) -> None:
        """Take an item of a list that is no plain list, and forget it."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {})


def _read_metadata(iteration_folder: Path) -> tuple[list[_Piece], bool]:
    """All pieces by the checkpoint's own `.metadata`, and whether it needs a `common.pt`.

    No class of the pickle is imported and nothing in it is run.

    Raises:
        CheckpointError: `.metadata` is missing or can't be parsed.
    """
    path = iteration_folder / ".metadata"
    try:
        metadata = _InertUnpickler(io.BytesIO(path.read_bytes())).load()
        pieces = [
            _Piece(
                str(storage.relative_path),
                int(storage.offset),
                int(storage.length),
                not getattr(storage, "transform_descriptors", None),
            )
            for storage in metadata.storage_data.values()
        ]
        # megatron-core 0.19 moved the common state from a file of its own into the shards.
        has_common_state = any(str(name).startswith("common_state") for name in metadata.state_dict_metadata)
    except OSError as exc:
        raise CheckpointError(
            f"{iteration_folder.name} is not complete", [Problem(str(path), found="no such file")]
        ) from exc
    except Exception as exc:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{iteration_folder.name} is damaged", [Problem(str(path), "a torch DCP metadata file", repr(exc))]
        ) from exc
    if not pieces:
        raise CheckpointError(f"{iteration_folder.name} is empty", [Problem(str(path), "stored tensors", "none")])
    return pieces, not has_common_state


def shard_lengths(iteration_folder: Path) -> dict[str, int]:
    """Bytes that each `.distcp` file must at least have, by the checkpoint's own `.metadata`.

    Raises:
        CheckpointError: `.metadata` is missing or can't be parsed.
    """
    return _lengths(_read_metadata(iteration_folder)[0])


def _lengths(pieces: list[_Piece]) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for piece in pieces:
        lengths[piece.shard] = max(lengths.get(piece.shard, 0), piece.offset + piece.length)
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
        pieces, needs_common = _read_metadata(iteration_folder)
    except CheckpointError as exc:
        return [*problems, *exc.problems]
    if needs_common:
        problems += _zip_problems(iteration_folder / "common.pt")
    for name, length in sorted(_lengths(pieces).items()):
        shard = iteration_folder / name
        size = shard.stat().st_size if shard.is_file() else None
        if size is None or size < length:
            problems.append(Problem(str(shard), f"{length} bytes", "no file" if size is None else f"{size} bytes"))
        else:
            problems += _frame_problems(shard, [piece for piece in pieces if piece.shard == name])
    return problems


def _zip_problems(path: Path) -> list[Problem]:
    """Findings about a small file of torch.save, by the checksums of the zip archive that it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        return [Problem(str(path), "a file", "none")]
    except Exception as exc:  # a damaged archive may raise anything
        return [Problem(str(path), "a file of torch.save", repr(exc))]
    return [Problem(str(path), "intact content", f"damaged: {damaged}")] if damaged else []


def _frame_problems(shard: Path, pieces: list[_Piece]) -> list[Problem]:
    """Findings about a shard at full length: each piece must begin and end as a zip archive of torch.save does."""
    with shard.open("rb") as file:
        for piece in pieces:
            if not piece.is_plain:
                continue
            file.seek(piece.offset)
            head = file.read(len(_ZIP_HEAD))
            file.seek(max(0, piece.offset + piece.length - _ZIP_TAIL_BYTES))
            tail = file.read(len(_ZIP_TAIL))
            if (head, tail) != (_ZIP_HEAD, _ZIP_TAIL):
                return [Problem(str(shard), f"a tensor of {piece.length} bytes at {piece.offset}", "other bytes")]
    return []


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
        checkpoint: Folder with the tracker; for `latest` also the folder of one iteration.
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


def _only_this(folder: Path) -> Selection:
    if problems := completeness_problems(folder):
        raise CheckpointError(f"{folder} can't be used", problems)
    named = re.fullmatch(r"iter_(\d{7,})", folder.resolve().name)
    return Selection(int(named[1]) if named else RELEASE, folder, "it is one iteration's own folder")


def _only_if_complete(checkpoint: Path, iteration: Iteration, reason: str) -> Selection:
    folder = iteration_dir(checkpoint, iteration)
    problems = completeness_problems(folder)
    if problems:
        raise CheckpointError(f"checkpoint {iteration} of {checkpoint} can't be used", problems)
    return Selection(iteration, folder, reason)


def _latest(checkpoint: Path) -> Selection:
    if (checkpoint / ".metadata").is_file():  # one iteration, as NeMo keeps its weights, or named by hand
        return _only_this(checkpoint)
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
    validated = {
        record["iteration"]: record["validation_loss"]
        for record in read_metrics(checkpoint / METRICS_FILE)
        if "validation_loss" in record
    }
    losses = {
        iteration: loss
        for iteration, loss in validated.items()
        if isinstance(loss, float | int) and math.isfinite(loss)  # NaN compares as neither better nor worse
    }
    found = {
        iteration: completeness_problems(iteration_dir(checkpoint, iteration))
        for iteration in iterations_in(checkpoint)
        if iteration in losses
    }
    complete = [iteration for iteration, problems in found.items() if not problems]
    if not complete:
        raise CheckpointError(
            f"{checkpoint} has no complete checkpoint with a validation loss",
            [
                Problem(
                    "strategy 'best'",
                    "a saved iteration with a validation loss",
                    f"saved {iterations_in(checkpoint)}, validated {sorted(losses)}",
                    "Make eval_steps a divisor of save_steps, or select by 'latest'.",
                ),
                *(problem for problems in found.values() for problem in problems),
            ],
        )
    best = min(complete, key=lambda candidate: (losses[candidate], candidate))
    return Selection(
        best, iteration_dir(checkpoint, best), f"lowest validation loss {losses[best]:.4f} of {len(complete)}"
    )
