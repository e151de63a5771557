"""Whether a run's folder can take the run: looked at before anything is started. No torch here."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema.train import TrainConfig
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import CONFIG_FILE, HF_FOLDER
from mcore.bridge.plan import mcore_shapes_of
from mcore.errors import Problem
from mcore.select import iterations_in

SHAPE_KEYS = ("architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys of `config.json` that tell models apart which can't go on from each other's checkpoints."""


def checkpoint_bytes(
    config: TrainConfig, hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 1
) -> int:
    """Bytes of one checkpoint, without its Hugging Face folder: weights, both moments, fp32 main weights where kept.

    0 with adapters, which are small beside the model.
    """
    if config.tuner_type == "lora":
        return 0
    weight = 4 if config.torch_dtype == "float32" else 2
    has_main_weights = config.use_distributed_optimizer or config.torch_dtype != "float32"
    count = num_parameters(hf_config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    return count * (weight + 4 * has_main_weights + 8)


def num_parameters(hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 1) -> int:
    """Numbers in a model's weights, padded rows of the vocabulary among them."""
    dims = dims_of(hf_config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    return sum(math.prod(shape) for shape in mcore_shapes_of(family_of_config(hf_config), dims).values())


def output_problems(
    output: Path, config: TrainConfig, hf_config: Mapping[str, Any], *, train_iters: int | None, num_bytes: int
) -> list[Problem]:
    """Everything that is wrong with the folder that a run is to make or to go on in.

    Args:
        output: The folder.
        config: The run's `train` group.
        hf_config: Mapping of the base model's `config.json`.
        train_iters: Steps of the run; None if that is not known yet.
        num_bytes: Of one checkpoint.
    """
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return [Problem(f"the run's folder: {existing}", "a folder", "a file")]
    problems = []
    if not os.access(existing, os.W_OK | os.X_OK):
        problems.append(Problem(f"the run's folder: {existing}", "one that can be written to", "no permission"))
    problems += room_problems(output, config, train_iters=train_iters, num_bytes=num_bytes)
    return problems + _foreign(output, hf_config)


def room_problems(output: Path, config: TrainConfig, *, train_iters: int | None, num_bytes: int) -> list[Problem]:
    """Whether there is room for all checkpoints that the run has at once; arguments as in `output_problems`."""
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    needed = num_checkpoints(config, train_iters)
    missing_bytes = max(0, needed - len(iterations_in(output))) * num_bytes
    free = shutil.disk_usage(existing).free
    if free >= missing_bytes:
        return []
    what = f"{needed} checkpoint{'s' * (needed > 1)} of {num_bytes / 1e9:.3f} GB"
    fix = "Save less often (train.save_steps), or keep fewer (train.save_total_limit)."
    return [Problem(f"the run's folder: {existing}", f"room for {what}", f"{free / 1e9:.3f} GB free", fix)]


def num_checkpoints(config: TrainConfig, train_iters: int | None) -> int:
    """How many there are at once, at most."""
    num_saved = 1 if train_iters is None else math.ceil(train_iters / config.save_steps)
    # The one that is superfluous goes when the next is there.
    return num_saved if config.save_total_limit is None else min(num_saved, config.save_total_limit + 1)


def _foreign(output: Path, hf_config: Mapping[str, Any]) -> list[Problem]:
    """Whether the folder holds checkpoints of another model."""
    path = output / HF_FOLDER / CONFIG_FILE
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if not iterations_in(output) or not isinstance(found, dict):
        return []
    fix = "Name another folder."
    return [
        Problem(f"checkpoints in {output}: {key}", f"{hf_config.get(key)}, as the model has", str(found.get(key)), fix)
        for key in SHAPE_KEYS
        if found.get(key) != hf_config.get(key)
    ]
