"""What keeps training from starting, and choices that no checkpoint will fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from configs.schema.select import SelectConfig
from configs.schema.train import TrainConfig
from mcore.errors import Problem
from tasks.graph import ADAPTER_FILES
from tasks.preflight.groups import Groups


def train_problems(train: TrainConfig) -> list[Problem]:
    """What keeps training from starting, whatever the model and the rows are."""
    problems = _adapter_problems(train)
    if importlib.util.find_spec("transformer_engine") is not None:
        return problems
    fixes = {"backend": "set backend to auto or torch"}
    return problems + [
        Problem(
            f"train.{name}: {str(getattr(train, name)).lower()}",
            "Transformer Engine to be installed",
            "not",
            f"Install it (requirements/gpu.txt), or {fixes.get(name, 'leave the field out')}.",
        )
        for name in train.fields_for_transformer_engine
    ]


def _adapter_problems(train: TrainConfig) -> list[Problem]:
    """What keeps a run with adapters from starting, whatever the model is."""
    if train.tuner_type != "lora":
        return []
    problems: list[Problem] = []
    if train.adapter_load is not None:
        folder = Path(train.adapter_load)
        problems += [
            Problem(f"train.adapter_load: {folder / name}", "a file of a PEFT adapter", "none")
            for name in ADAPTER_FILES
            if not (folder / name).is_file()
        ]
    return problems


def select_problems(select: SelectConfig, groups: Groups) -> list[Problem]:
    """A choice that no checkpoint will fit, which would show only when training is over."""
    data, train = groups.data, groups.train
    has_validation = data is None or bool(data.val_dataset or data.split_dataset_ratio)
    if select.strategy == "best" and not has_validation:
        fix = "Give data.val_dataset or data.split_dataset_ratio, or select by latest."
        return [Problem("select.strategy: best", "validation rows", "none", fix)]
    if select.iteration is None or train is None or train.train_iters is None:
        return []
    saved = [*range(train.save_steps, train.train_iters, train.save_steps), train.train_iters]
    # Of those that are kept, one is the best, if there is a best one; which it will be is not known yet.
    kept = saved if train.save_total_limit is None else saved[has_validation - train.save_total_limit :]
    if select.iteration in kept:
        return []
    listed = ", ".join(map(str, kept if len(kept) < 8 else [*kept[:6], "…", kept[-1]]))
    return [Problem("select.iteration", f"an iteration that is saved and kept ({listed})", str(select.iteration))]
