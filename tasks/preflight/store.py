"""Whether the store can be written to, and has room for what comes into it."""

from __future__ import annotations

import os
from pathlib import Path

from configs.schema.convert import ConvertConfig
from mcore.bridge.hf_config import read_hf_config
from mcore.errors import Problem
from mcore.sources.resolve import ResolvedSource
from mcore.train.output import checkpoint_bytes, room_problems
from tasks.model_folder import collected
from tasks.preflight.groups import Groups


def store_problems(store: Path) -> list[Problem]:
    """Whether the store is a folder that can be written to."""
    existing = next(folder for folder in (store.absolute(), *store.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return [Problem(f"launch.store: {existing}", "a folder", "a file")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Problem(f"launch.store: {existing}", "a folder that can be written to", "no permission")]
    return []


def room_problems_of(source: ResolvedSource, fetched: Path | None, groups: Groups) -> list[Problem]:
    """Whether the store has room for the checkpoints of training, where their size can be told."""
    train, launch, folder = groups.train, groups.launch, source.path or fetched
    divisor = (groups.convert or ConvertConfig()).make_vocab_size_divisible_by
    config = collected([], lambda: read_hf_config(folder) if folder is not None else source.hf_config())
    if train is None or launch is None or config is None:
        return []
    num_bytes = collected([], lambda: checkpoint_bytes(train, config, make_vocab_size_divisible_by=divisor))
    return room_problems(Path(launch.store), train, train_iters=train.train_iters, num_bytes=num_bytes or 0)
