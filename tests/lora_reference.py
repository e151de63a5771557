"""Adapters on transformers' models: `peft` where it can, and its formula on the stacked experts and routers.

r rank, E experts, O out, H in
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from mcore.train.tuners.options import LoraOptions
from mcore.train.tuners.targets import Target, choose_targets
from mcore.train.tuners.whole import choose_whole

Matrices = dict[str, Tensor]
"""A `[r, H]` and B `[O, r]` by the names that an adapter's file has for them."""


def names(target: Target) -> tuple[str, str]:
    """Of A and B in a file, without `base_model.model.`."""
    if target.kind == "embedding":
        return f"{target.hf_module}.lora_embedding_A", f"{target.hf_module}.lora_embedding_B"
    return f"{target.hf_module}.lora_A.weight", f"{target.hf_module}.lora_B.weight"


def random_matrices(options: LoraOptions, model: PreTrainedModel, config: Mapping[str, Any], seed: int = 5) -> Matrices:
    """Matrices of every chosen module, none of them zero, no two alike; and other weights of those that learn whole."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    targets = choose_targets(options.target_modules, config)
    for target in targets:
        out_size, in_size = _shape(model, target)
        name_a, name_b = names(target)
        matrices[name_a] = torch.randn(options.lora_rank, in_size, generator=generator) / in_size**0.5
        matrices[name_b] = torch.randn(out_size, options.lora_rank, generator=generator) / (5 * options.lora_rank**0.5)
    for name in whole_names(options, config):
        weight = model.state_dict()[name]
        matrices[name] = weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return matrices


def write_adapter(folder: Path, options: LoraOptions, config: Mapping[str, Any], matrices: Matrices) -> None:
    """A PEFT adapter's folder."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(options.peft_config(config))
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in matrices.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def whole_names(options: LoraOptions, config: Mapping[str, Any]) -> list[str]:
    """Tensors of the modules that learn whole."""
    targets = choose_targets(options.target_modules, config)
    return [name for step in choose_whole(options.modules_to_save, config, targets) for name in step.hf_names]


class Lora:
    """A transformers model with adapters, and the parameters of them by the names of a file."""

    def __init__(
        self, model: PreTrainedModel, config: Mapping[str, Any], options: LoraOptions, matrices: Mapping[str, Tensor]
    ) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        targets = choose_targets(options.target_modules, config)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._of_parameters(model, [target for target in targets if not _is_module(model, target)], options, matrices)
        modules = [target for target in targets if _is_module(model, target)]
        self.model: Any = model
        if modules:
            self.model = _with_peft(model, modules, options)
            for name, parameter in self.model.named_parameters():
                if ".lora_" in name or ".modules_to_save." in name:
                    plain = re.sub(r"^base_model\.model\.|\.modules_to_save|\.default", "", name)
                    self.parameters[plain] = parameter
                    parameter.data.copy_(matrices[plain])
        assert self.parameters.keys() == matrices.keys()
        for parameter in self.parameters.values():  # PEFT froze those that it does not know
            parameter.requires_grad_(True)

    def _of_parameters(
        self, model: PreTrainedModel, targets: list[Target], options: LoraOptions, matrices: Mapping[str, Tensor]
    ) -> None:
        """What PEFT has no module for: the formula of its `target_parameters`."""
        places: dict[tuple[str, str], list[Target]] = {}
        for target in targets:
            places.setdefault(_place(target), []).append(target)
        for (module, name), of_place in places.items():
            delta = _Delta(of_place, options.scale, matrices)
            register_parametrization(model.get_submodule(module), name, delta)
            for target in of_place:
                for file_name, parameter in zip(names(target), delta.pair(target), strict=True):
                    self.parameters[file_name] = parameter


def _with_peft(model: PreTrainedModel, targets: list[Target], options: LoraOptions) -> PeftModel:
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        target_modules=[target.hf_module for target in targets],
        modules_to_save=list(options.modules_to_save) or None,
    )
    return get_peft_model(model, config)


class _Delta(torch.nn.Module):
    def __init__(self, targets: list[Target], scale: float, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.targets, self.scale = targets, scale
        self.all = torch.nn.ParameterList(matrices[name].clone() for target in targets for name in names(target))

    def pair(self, target: Target) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        number = 2 * self.targets.index(target)
        return self.all[number], self.all[number + 1]

    def forward(self, weight: Tensor) -> Tensor:
        deltas: dict[int, list[Tensor]] = {}
        for target in self.targets:
            a, b = self.pair(target)
            deltas.setdefault(target.expert or 0, []).append(self.scale * (b @ a))
        whole = torch.stack([torch.cat(of_expert) for _, of_expert in sorted(deltas.items())])
        return weight + (whole if weight.dim() == 3 else whole[0])


def _is_module(model: PreTrainedModel, target: Target) -> bool:
    """Whether PEFT puts an adapter on this module. In models with experts it takes every MLP for an expert's."""
    is_mlp = ".mlp." in target.hf_module and any(".experts" in name for name, _ in model.named_modules())
    return target.kind != "router" and not is_mlp


def _place(target: Target) -> tuple[str, str]:
    if target.expert is None:
        return target.hf_module, "weight"
    experts, leaf = target.hf_module.rsplit(".", 2)[0], target.hf_module.rpartition(".")[2]
    return experts, "down_proj" if leaf in ("down_proj", "w2") else "gate_up_proj"


def _shape(model: PreTrainedModel, target: Target) -> tuple[int, int]:
    if target.expert is None:
        out_size, in_size = model.get_submodule(target.hf_module).weight.shape
        return (in_size, out_size) if target.kind == "embedding" else (out_size, in_size)
    experts, name = _place(target)
    _, out_size, in_size = getattr(model.get_submodule(experts), name).shape
    return (out_size if name == "down_proj" else out_size // 2), in_size
