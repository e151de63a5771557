"""Adapters that PEFT or vLLM would read wrongly are told apart; what PEFT does with others is seen in the proofs."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema.lora import LoraFields
from mcore.train.tuners.readers import adapter_file_problems
from tests.tiny_models import tiny_hf_model


@pytest.mark.parametrize(
    ("name", "targets", "evaluates", "what"),
    [
        ("llama", ("all-linear",), True, []),
        ("llama", ("all-linear", "all-embedding"), False, []),
        ("llama", ("all-linear", "all-embedding"), True, ["some of embedding"]),
        ("qwen3_moe", ("all-linear", "all-router"), False, []),
        ("qwen3_moe", ("q_proj", "experts.linear_fc2"), False, []),
        ("qwen3_moe", ("q_proj", "experts.linear_fc1"), False, ["adapters on some of an expert's matrices"]),
        ("qwen3_moe", ("up_proj", "down_proj"), False, ["adapters on some of an expert's matrices"]),
        ("qwen3_moe", ("q_proj",), True, []),
        ("qwen3_moe", ("all-linear", "all-router"), True, ["some of experts, router"]),
        ("qwen2_moe", ("all-linear",), False, ["their down_proj, gate_proj, up_proj"]),
        ("deepseek_v3", ("all-linear",), False, ["their down_proj, gate_proj, up_proj"]),
        ("deepseek_v3", ("o_proj", "experts.linear_fc1", "experts.linear_fc2"), False, []),
        ("deepseek_v3", ("o_proj",), True, ["a model with latents"]),
    ],
)
def test_an_adapter_by_itself_is_only_for_who_can_read_it(
    name: str, targets: tuple[str, ...], evaluates: bool, what: list[str]
) -> None:
    fields: Any = LoraFields(tuner_type="lora", target_modules=targets)
    problems = adapter_file_problems(fields, tiny_hf_model(name)[1], evaluates=evaluates)
    assert len(problems) == len(what)
    assert all(text in str(problem) for text, problem in zip(what, problems, strict=True)), problems
