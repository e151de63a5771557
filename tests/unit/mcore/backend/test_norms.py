"""Our own norms against the reference models'. S sequence, B batch, N heads, D head size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from mcore.backend.norms import ProjectionRMSNorm, RMSNorm
from tests.tiny_models import tiny_hf_model
from tests.unit.mcore.backend.test_model import mcore_model

pytestmark = pytest.mark.usefixtures("alone")
KINDS: dict[type, tuple[dict[str, Any], dict[str, Any]]] = {
    LlamaRMSNorm: ({}, {}),
    Olmo2RMSNorm: ({}, {"scale_in_fp32": True}),
    Gemma2RMSNorm: ({"layernorm_zero_centered_gamma": True}, {}),
}
"""For each norm of transformers what our config and our norm are told."""


def config(dtype: torch.dtype = torch.float32, **changes: Any) -> SimpleNamespace:
    fields = {"params_dtype": dtype, "sequence_parallel": False, "layernorm_zero_centered_gamma": False}
    return SimpleNamespace(**{**fields, "qk_layernorm": False, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_the_reference_models_to_the_bit(kind: type, eps: float, dtype: torch.dtype) -> None:
    fields, options = KINDS[kind]
    ours, reference = RMSNorm(config(dtype, **fields), 48, eps, **options), kind(48, eps).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(1 + 0.3 * torch.randn(48))
        reference.weight.copy_(ours.weight)
    hidden = (3 * torch.randn(5, 2, 48)).to(dtype)
    assert ours.weight.dtype == dtype
    assert torch.equal(ours(hidden), reference(hidden))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "mistral",
        "phi3",
        "gemma2",
        "gemma3",
        "glm4",
        "olmo2",
        "mixtral",
        "olmoe",
        "gpt_oss",
        "deepseek_v3",
        "glm4_moe",
    ],
)
def test_each_family_rounds_as_its_reference_model_does(name: str) -> None:
    """In bf16, where it shows: the last norm of both models, on the same numbers."""
    hf, hf_config = tiny_hf_model(name, dtype=torch.bfloat16)
    model = mcore_model(hf, hf_config, params_dtype=torch.bfloat16)
    hidden = (3 * torch.randn(50, 2, hf_config["hidden_size"])).bfloat16()
    assert torch.equal(model.decoder.final_layernorm(hidden), hf.model.norm(hidden))


def test_the_kinds_differ_in_bf16() -> None:
    """The control of the test above: in bf16 it can tell them apart."""
    hidden, weight = (3 * torch.randn(50, 48)).bfloat16(), (1 + 0.3 * torch.randn(48)).bfloat16()
    outputs = []
    for fields, options in KINDS.values():
        norm = RMSNorm(config(torch.bfloat16, **fields), 48, **options)
        norm.weight.data.copy_(weight)
        outputs.append(norm(hidden))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_norms_weight_says_whether_its_gradient_is_a_part(sequence_parallel: bool) -> None:
    norm = RMSNorm(config(sequence_parallel=sequence_parallel), 8)
    assert norm.weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_projection_goes_over_all_heads(dtype: torch.dtype) -> None:
    ours = ProjectionRMSNorm(config(dtype), 16, 1e-3, num_heads=3, scale_in_fp32=True)
    reference = Olmo2RMSNorm(48, 1e-3).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(1 + 0.3 * torch.randn(48))
        reference.weight.copy_(ours.weight)
    heads_SBND = (torch.randn(5, 2, 3, 16) * torch.tensor([0.1, 1.0, 10.0])[:, None]).to(dtype)
    expected = reference(heads_SBND.flatten(2)).view_as(heads_SBND)
    torch.testing.assert_close(ours(heads_SBND), expected, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=0)


def test_the_norm_of_a_projection_refuses_a_config_that_would_sum_its_gradients() -> None:
    with pytest.raises(AssertionError, match="add up the gradients"):
        ProjectionRMSNorm(config(qk_layernorm=True), 16, num_heads=3)


def test_a_divided_norm_counts_as_divided_and_not_as_a_copy() -> None:
    norm = ProjectionRMSNorm(config(sequence_parallel=True), 16, num_heads=3)
    assert norm.weight.tensor_model_parallel
    assert not norm.weight.sequence_parallel
