"""What adapters a run has: the fields of its `train` group that say so, and the same as PEFT writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.schema.lora import LoraFields
from mcore.bridge.adapters import AdapterConfig, read_adapter_config, read_adapter_weights, vocabulary_axis
from mcore.errors import ConfigError, InputError, Problem
from mcore.train.tuners.targets import choose_targets, peft_target_modules
from mcore.train.tuners.whole import choose_whole, peft_modules_to_save


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What an adapter is: the modules that have one, its rank, how strong it is, and which modules learn whole."""

    target_modules: tuple[str, ...]
    lora_rank: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: LoraFields) -> LoraOptions:
        """Those of a run."""
        names = ("target_modules", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save")
        return cls(**{name: getattr(fields, name) for name in names})

    @property
    def scale(self) -> float:
        """Factor on `B @ A`."""
        return AdapterConfig(self.lora_rank, self.lora_alpha, self.use_rslora, ()).scale

    def peft_config(self, hf_config: Mapping[str, Any]) -> str:
        """Content of an `adapter_config.json` for a model."""
        targets = choose_targets(self.target_modules, hf_config)
        config = AdapterConfig(
            self.lora_rank,
            self.lora_alpha,
            self.use_rslora,
            tuple(peft_target_modules(targets, hf_config)),
            tuple(peft_modules_to_save(choose_whole(self.modules_to_save, hf_config, targets), hf_config)),
        )
        # transformers holds these as parameters, not modules; PEFT's adapters of parameters can't have any dropout.
        of_parameters = any(target.expert is not None or target.kind == "router" for target in targets)
        return config.to_json(lora_dropout=0.0 if of_parameters else self.lora_dropout)


def read_adapter(
    folder: Path, options: LoraOptions, wanted: Mapping[str, tuple[int, ...]], *, vocab_size: int
) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter that a run starts from, with the vocabulary as wide as megatron's.

    Args:
        folder: The adapter's.
        options: The run's.
        wanted: Shapes of all that learns by name, with the vocabulary as wide as megatron's.
        vocab_size: Rows of the embedding that the files have.

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
        tensor, in_file, axis = found.get(name), list(shape), vocabulary_axis(name)
        if axis is not None:
            in_file[axis] = min(in_file[axis], vocab_size)
        if tensor is None or list(tensor.shape) != in_file:
            there = "none" if tensor is None else str(list(tensor.shape))
            what = "a matrix" if ".lora_" in name else "a tensor"
            problems.append(Problem(f"{folder}: {name}", f"{what} {in_file}", there))
        elif not tensor.isfinite().all():
            problems.append(Problem(f"{folder}: {name}", "finite numbers", "NaN or infinity"))
        else:
            weights[name] = tensor.new_zeros(shape)
            weights[name][tuple(slice(0, size) for size in in_file)] = tensor
    for name in sorted(found.keys() - wanted.keys()):
        fix = "Save it with save_embedding_layers=False." if name.endswith(".base_layer.weight") else ""
        what = "a module of train.target_modules or train.modules_to_save"
        problems.append(Problem(f"{folder}: {name}", what, "none of that name", fix))
    if problems:
        raise ConfigError("the adapter does not fit the run", problems)
    return weights


def adapter_problems(fields: LoraFields, hf_config: Mapping[str, Any]) -> list[Problem]:
    """Everything that keeps a model from being trained with the adapters that a run asks for."""
    if fields.tuner_type == "full":
        return []
    problems: list[Problem] = []
    try:
        targets = choose_targets(fields.target_modules, hf_config)
        choose_whole(fields.modules_to_save, hf_config, targets)
        if fields.adapter_load is not None:
            read_adapter_config(Path(fields.adapter_load))
    except InputError as error:
        problems += error.problems
    return problems
