"""Adapters that a reader of the PEFT format gets wrong or refuses, although the file says all there is. No torch here.

Only adapters that are exported by themselves (`export.merge_lora: false`) have to be read so.
Source: peft 0.21 `utils/transformers_weight_conversion.py`, `tuners/lora/layer.py`; vLLM 0.32 `lora/peft_helper.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from configs.schema.lora import LoraFields
from mcore.bridge.families import dims_of
from mcore.errors import Problem
from mcore.train.tuners.targets import Target, choose_targets

MERGE = "Set export.merge_lora: true."
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last parts of the names that PEFT takes for experts' matrices."""


def adapter_file_problems(train: LoraFields, hf_config: Mapping[str, Any], *, evaluates: bool) -> list[Problem]:
    """What keeps an adapter from being read by the tools that a run without merging hands it to.

    Args:
        train: The run's `train` group, whose modules are known to be there.
        hf_config: The model's `config.json`.
        evaluates: Whether vLLM serves the adapter; PEFT loads it for the proof in any case.
    """
    targets, dims = choose_targets(train.target_modules, hf_config), dims_of(hf_config)
    problems = _peft_problems(targets) if any(dims.moe_layers) else []
    if evaluates:
        problems += _vllm_problems(targets, train.modules_to_save, has_latents="kv_lora" in dims.more)
    return problems


def _peft_problems(targets: Sequence[Target]) -> list[Problem]:
    """Of a model with experts. transformers stacks them, so PEFT makes their adapters into others of stacked tensors.

    It tells them by the last part of a name, and so takes every MLP for an expert's. And of experts with adapters on
    gate and up it looks for one on down too.
    """
    of_experts = [target for target in targets if target.expert is not None]
    beside = {_leaf(target) for target in targets if target.expert is None} & set(OF_EXPERTS)
    problems = []
    if beside:
        text = "no MLP of dense layers and no shared experts, as PEFT takes every MLP for an expert's"
        problems.append(Problem("train.target_modules", text, f"their {', '.join(sorted(beside))}", MERGE))
    first = {target.part for target in of_experts if _is_first(target)}
    has_second = any(not _is_first(target) for target in of_experts)
    if first and (len(first) < 2 or not has_second):
        text = "adapters on some of an expert's matrices"
        problems.append(Problem("train.target_modules", "gate, up and down of experts, or down alone", text, MERGE))
    return problems


def _vllm_problems(targets: Sequence[Target], modules_to_save: Sequence[str], *, has_latents: bool) -> list[Problem]:
    """What keeps vLLM from serving a base with adapters on these modules; other kinds have not been seen to work."""
    problems = []
    kinds = {"experts" if target.expert is not None else target.kind for target in targets} - {"linear"}
    if kinds:
        text = "adapters of attention and MLP only, as the evaluation serves the adapter in vLLM"
        problems.append(Problem("train.target_modules", text, f"some of {', '.join(sorted(kinds))}", MERGE))
    if has_latents:
        text = "attention without latents (MLA), as the evaluation serves the adapter in vLLM"
        problems.append(Problem("export.merge_lora: false", text, "a model with latents", MERGE))
    if modules_to_save:
        text = "none, as the evaluation serves the adapter in vLLM, which has no place for them"
        problems.append(Problem("train.modules_to_save", text, ", ".join(modules_to_save), MERGE))
    return problems


def _is_first(target: Target) -> bool:
    return target.mcore_module.endswith("linear_fc1")


def _leaf(target: Target) -> str:
    return target.hf_module.rpartition(".")[2]
