"""What adapters a run has: the fields of its `train` group that say so, and the same as PEFT writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema.lora import LoraFields
from mcore.bridge.adapters import AdapterConfig, read_adapter_config, read_adapter_weights
from mcore.errors import ConfigError, InputError, Problem
from mcore.train.tuners.targets import choose_targets, peft_target_modules


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What an adapter is: the modules that have one, its rank, and how strong it is."""

    target_modules: tuple[str, ...]
    lora_rank: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False

    @classmethod
    def of(cls, fields: LoraFields) -> LoraOptions:
        """Those of a run."""
        names = ("target_modules", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora")
        return cls(**{name: getattr(fields, name) for name in names})

    @property
    def scale(self) -> float:
        """Factor on `B @ A`."""
        return AdapterConfig(self.lora_rank, self.lora_alpha, self.use_rslora, ()).scale

    def peft_config(self, hf_config: Mapping[str, Any]) -> str:
        """Content of an `adapter_config.json` for a model."""
        modules = peft_target_modules(choose_targets(self.target_modules, hf_config), hf_config)
        config = AdapterConfig(self.lora_rank, self.lora_alpha, self.use_rslora, tuple(modules))
        return config.to_json(lora_dropout=self.lora_dropout)


def read_adapter(folder: Path, options: LoraOptions, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The matrices of a PEFT adapter that a run starts from.

    Args:
        folder: The adapter's.
        options: The run's.
        wanted: Shapes of all matrices of the model by name, with the vocabulary as wide as megatron's.

    Raises:
        SourceError: There is no adapter.
        ConfigError: It is not the run's kind of adapter, or on other modules. Names everything that differs.
    """
    config, found = read_adapter_config(folder), read_adapter_weights(folder)
    problems = [
        Problem(f"train.{name}", f"{getattr(config, name)}, as {folder} has it", str(getattr(options, name)))
        for name in ("lora_rank", "lora_alpha", "use_rslora")
        if getattr(config, name) != getattr(options, name)
    ]
    weights: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        tensor = found.get(name)
        if tensor is not None and name.endswith("lora_embedding_A") and tensor.shape[1] < shape[1]:
            tensor = torch.nn.functional.pad(tensor, (0, shape[1] - tensor.shape[1]))
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            there = "none" if tensor is None else str(list(tensor.shape))
            problems.append(Problem(f"{folder}: {name}", f"a matrix {list(shape)}", there))
        elif not tensor.isfinite().all():
            problems.append(Problem(f"{folder}: {name}", "finite numbers", "NaN or infinity"))
        else:
            weights[name] = tensor
    problems += [
        Problem(f"{folder}: {name}", "a module of train.target_modules", "none of that name")
        for name in sorted(found.keys() - wanted.keys())
    ]
    if problems:
        raise ConfigError("the adapter does not fit the run", problems)
    return weights


def adapter_problems(fields: LoraFields, hf_config: Mapping[str, Any], backend: str) -> list[Problem]:
    """Everything that keeps a model from being trained with the adapters that a run asks for."""
    if fields.tuner_type == "full":
        return []
    problems = []
    if backend != "torch":
        text = "torch, as adapters are not built on Transformer Engine's layers"
        problems.append(Problem("train.backend", text, backend, "Set train.backend: torch."))
    try:
        choose_targets(fields.target_modules, hf_config)
        if fields.adapter_load is not None:
            read_adapter_config(Path(fields.adapter_load))
    except InputError as error:
        problems += error.problems
    return problems
