"""Whether the store can be written to, and has room for what comes into it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from configs.schema.run import RunConfig
from mcore.artifacts import Store
from mcore.errors import Problem
from mcore.select import iterations_in
from mcore.train.output import checkpoint_bytes, num_checkpoints, num_parameters
from tasks.graph import StagePlan
from tasks.model_folder import collected

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TEST_BYTES = 64 * 1024
"""More than a file system keeps in an inode, so that a quota or a full disk shows."""


def store_problems(store: Path) -> list[Problem]:
    """Whether the store is a folder that can be written to, by its permissions."""
    existing = existing_folder(store)
    if not existing.is_dir():
        return [Problem(f"launch.store: {existing}", "a folder", "a file")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Problem(f"launch.store: {existing}", "a folder that can be written to", "no permission")]
    return []


def write_problems(store: Path) -> list[Problem]:
    """Whether something that is written there arrives; nothing stays, and where the system can no name appears."""
    folder = existing_folder(store)
    try:
        _write_and_forget(folder)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        return [
            Problem(f"launch.store: {folder}", f"{TEST_BYTES // 1024} KiB to be written", reason, "Free some room.")
        ]
    return []


def _write_and_forget(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as exc:
        if exc.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
        with tempfile.TemporaryFile(dir=folder) as file:  # a network file system, which has no files without names
            file.write(bytes(TEST_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return
    try:
        os.write(descriptor, bytes(TEST_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def room_problems(
    run: RunConfig,
    hf_config: Mapping[str, Any],
    weights: Path | None,
    store: Store,
    *,
    runs: Container[str],
    training: StagePlan | None,
) -> list[Problem]:
    """Whether there is room for all that the run will make, as far as its size can be told.

    Args:
        run: The run.
        hf_config: The model's `config.json`.
        weights: Folder of its weights, if that is there.
        store: Where all of it comes.
        runs: Names of the stages that will run.
        training: What is known of training, so that checkpoints that are there count.
    """
    divisor = run.convert.make_vocab_size_divisible_by
    count = collected([], lambda: num_parameters(hf_config, make_vocab_size_divisible_by=divisor))
    if count is None:
        return []  # said with the model
    parts: dict[str, int] = {}
    if "convert" in runs:
        files = list(weights.glob("*.safetensors")) if weights is not None else []
        parts["the converted base"] = sum(file.stat().st_size for file in files) or count * 2
    if "train" in runs:
        there = iterations_in(store.partial(training.kind, training.key)) if training is not None else ()
        missing = max(0, num_checkpoints(run.train, run.train.train_iters) - len(there))
        each = checkpoint_bytes(run.train, hf_config, make_vocab_size_divisible_by=divisor)
        each += count * WEIGHT_BYTES[run.train.torch_dtype] if run.train.save_safetensors else 0
        parts[f"{missing} checkpoint{'s' * (missing != 1)} of {each / 1e9:.3f} GB"] = missing * each
    if "export" in runs and run.export.merge_lora:
        dtype = run.train.torch_dtype if run.export.torch_dtype == "auto" else run.export.torch_dtype
        parts["the exported model"] = count * WEIGHT_BYTES[dtype]
    folder = existing_folder(store.root)
    needed, free = sum(parts.values()), shutil.disk_usage(folder).free
    if needed <= free:
        return []
    listed = ", ".join(f"{what}{'' if 'of' in what else f' ({size / 1e9:.3f} GB)'}" for what, size in parts.items())
    fix = "Save less often (train.save_steps), keep fewer (train.save_total_limit), or `mcore-flows artifacts gc`."
    return [
        Problem(
            f"launch.store: {folder}", f"room for {needed / 1e9:.3f} GB: {listed}", f"{free / 1e9:.3f} GB free", fix
        )
    ]


def existing_folder(path: Path) -> Path:
    """The path, or what is there of it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
