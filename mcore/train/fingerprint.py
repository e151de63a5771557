"""What a run was started with, kept in `fingerprint.json`, so that no run goes on from another one's checkpoints.

What may differ between two starts of one run is left out: the layout, the micro-batch size, recomputation and the
backend (they change no more than rounding), how often is saved, validated and logged, and where things lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema.experts import ExpertFields
from configs.schema.train import TrainConfig
from mcore.bridge.adapters import WEIGHTS
from mcore.errors import ConfigError, Problem
from mcore.folders import write_durably
from mcore.select import iterations_in
from mcore.train.schedule import Schedule

FILE_NAME = "fingerprint.json"
VERSION = 1
HEAD_BYTES = 2**20

FIELDS = (
    "method",
    "tuner_type",
    "use_distributed_optimizer",
    "global_batch_size",
    "lr",
    "min_lr",
    "lr_decay_style",
    "weight_decay",
    "clip_grad",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "seed",
    "torch_dtype",
    "use_precision_aware_optimizer",
    "main_grads_dtype",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
)
"""Fields of `train` that decide what is learnt, or what a checkpoint holds."""
DECAY_FIELDS = ("lr_decay_iters", "lr_wsd_decay_style", "lr_wsd_decay_iters")
"""The same of runs whose learning rate does not just decay over all steps."""
DATA_FIELDS = ("train.global_batch_size",)
"""Entries that say how the data are cut into batches."""
EXPERT_FIELDS = tuple(ExpertFields.model_fields)
"""The same of runs that balance experts."""
CAPACITY_FIELDS = (
    "micro_batch_size",
    "packing",
    "packing_length",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
"""The same of runs whose experts have a capacity: it counts a process' part of a micro-batch."""
OFFLOAD_FIELD = "optimizer_cpu_offload"
"""The same of runs whose optimizer is in the host's memory: another Adam makes the updates."""
FP8_FIELDS = ("fp8_format", "fp8_recipe")
"""The same of runs that multiply in FP8."""
FP8_DELAYED_FIELDS = ("fp8_amax_history_len", "fp8_amax_compute_algo")
"""The same of those that scale by earlier steps."""
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora")
"""The same of runs with adapters."""


def fingerprint(
    config: TrainConfig, schedule: Schedule, *, data: str, validation: str, base_weights: Path, num_processes: int = 1
) -> dict[str, Any]:
    """The fingerprint of a run as a nested mapping of plain values.

    Args:
        config: The run's `train` group.
        schedule: Its resolved length and warm-up.
        data: Digest of the training samples and their order.
        validation: Digest of the validation samples.
        base_weights: The base checkpoint's `release/` (or another iteration's) folder, or a Hugging Face folder.
        num_processes: Of the run; counts where experts have a capacity.
    """
    return {
        "version": VERSION,
        "train": {name: getattr(config, name) for name in FIELDS}
        | _of_adapters(config)
        | _of_experts(config, num_processes)
        | _of_fp8(config)
        | _of_decay(config)
        | ({OFFLOAD_FIELD: True} if config.optimizer_cpu_offload else {})
        | {"train_iters": schedule.train_iters, "lr_warmup_iters": schedule.lr_warmup_iters},
        "data": {"train": data, "validation": validation},
        "base": {"weights": weights_digest(base_weights)},
    }


def weights_digest(folder: Path) -> str:
    """SHA-256 over names, sizes and the first MiB of each weight file: tells models apart without reading all."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.distcp"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEAD_BYTES))
    return digest.hexdigest()


def _of_decay(config: TrainConfig) -> dict[str, Any]:
    """Fields of a decay of another length or kind; none of a run that decays over all steps."""
    if config.lr_decay_iters is None and config.lr_decay_style != "WSD":
        return {}
    return {name: getattr(config, name) for name in DECAY_FIELDS}


def _of_experts(config: TrainConfig, num_processes: int) -> dict[str, Any]:
    """Fields that balance experts, and with a capacity the layout; none of a run that balances nothing."""
    fields: dict[str, Any] = {name: getattr(config, name) for name in EXPERT_FIELDS}
    if fields == ExpertFields().model_dump():
        return {}
    if config.moe_expert_capacity_factor is None:
        return fields
    return fields | {name: getattr(config, name) for name in CAPACITY_FIELDS} | {"num_processes": num_processes}


def _of_fp8(config: TrainConfig) -> dict[str, Any]:
    """Fields that say how matrices are multiplied in FP8; none of a run that does not."""
    if config.fp8_format is None:
        return {}
    fields = FP8_FIELDS + (FP8_DELAYED_FIELDS if config.fp8_recipe == "delayed" else ())
    return {name: getattr(config, name) for name in fields}


def _of_adapters(config: TrainConfig) -> dict[str, Any]:
    """Fields that decide what a run with adapters learns; none of a run without."""
    if config.tuner_type == "full":
        return {}
    of_adapters: dict[str, Any] = {name: getattr(config, name) for name in LORA_FIELDS}
    of_adapters["target_modules"] = list(config.target_modules)
    if config.modules_to_save:
        of_adapters["modules_to_save"] = list(config.modules_to_save)
    if config.adapter_load is not None:
        weights = Path(config.adapter_load) / WEIGHTS
        of_adapters["adapter_load"] = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    return of_adapters


Changes = dict[str, list[Any]]
"""What differs from how a run was started: names, each with its value then and now."""


def claim(output: Path, mine: dict[str, Any], *, accept_changed_data: bool = False) -> Changes:
    """Make `output` this run's folder, or check that it is. Nothing is written into a folder that is not.

    Args:
        output: The run's folder.
        mine: This start's fingerprint.
        accept_changed_data: Whether the data and how they are cut into batches may differ.

    Returns:
        What of that does; it has to be recorded, and `renew` be called.

    Raises:
        ConfigError: It holds checkpoints of a run with another fingerprint, or something that is no run.
    """
    path = output / FILE_NAME
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        if output.exists():
            _refuse_foreign(output)
        output.mkdir(parents=True, exist_ok=True)
        found = None
    except (OSError, ValueError) as exc:
        raise ConfigError("the output folder can't be resumed", [Problem(str(path), "a JSON file", str(exc))]) from exc
    if found == mine:
        return {}
    if not iterations_in(output):  # nothing to go on from, so nothing that could be mixed up
        renew(output, mine)
        return {}
    if not isinstance(found, dict):
        problems = [Problem(str(path), "a JSON object", type(found).__name__)]
        raise ConfigError("the output folder belongs to another run", problems)
    changes = _changes(found, mine)
    if not accept_changed_data or not all(map(_is_of_data, changes)):
        raise ConfigError("the output folder belongs to another run", _problems(changes, accept_changed_data))
    return changes


def renew(output: Path, mine: dict[str, Any]) -> None:
    """Write a run's fingerprint."""
    write_durably(output / FILE_NAME, json.dumps(mine, indent=2) + "\n")


def _refuse_foreign(output: Path) -> None:
    # What a process that died while it wrote the fingerprint left is ours.
    there = [path.name for path in sorted(output.iterdir()) if not path.name.startswith(f".{FILE_NAME}.")]
    if there:
        raise ConfigError(
            "the output folder is no run's",
            [
                Problem(
                    str(output),
                    f"an empty folder, or one with the {FILE_NAME} of a run",
                    ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else ""),
                    "Name another --output.",
                )
            ],
        )


def _changes(found: dict[str, Any], mine: dict[str, Any]) -> Changes:
    before, now = dict(_flat(found)), dict(_flat(mine))
    return {
        name: [before.get(name), now.get(name)]
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


def _problems(changes: Changes, accept_changed_data: bool) -> list[Problem]:
    also = "" if accept_changed_data else ", or set train.accept_changed_data"
    return [
        Problem(
            name,
            f"{'nothing' if before is None else before}, as the run was started with",
            str("nothing" if now is None else now),
            f"Go on with the same setting, or name another --output{also * _is_of_data(name)}.",
        )
        for name, (before, now) in changes.items()
        if not (accept_changed_data and _is_of_data(name))
    ]


def _is_of_data(name: str) -> bool:
    return name.startswith("data.") or name in DATA_FIELDS


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
