"""Model FLOPs against those that torch counts while transformers' own model runs forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mcore.train.flops import ModelFlops, active_experts
from tests.tiny_models import tiny_hf_model

LENGTH = 24
MODELS = ("llama", "qwen3_tied", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")


def counted(name: str, *, is_frozen: bool = False) -> tuple[float, float]:
    """FLOPs of a sample that torch counts, all pairs of tokens in attention included, and FLOPs by our formula."""
    model, hf_config = tiny_hf_model(name)
    model.set_experts_implementation("eager")  # torch doesn't count the products of the others
    if is_frozen:
        model.requires_grad_(False)
        # As adapters in the first layer make it: gradients go through all layers.
        model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_())
    ids = torch.arange(1, LENGTH + 1)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    ours = ModelFlops.of(hf_config)
    # torch's eager attention multiplies every pair, and the mask hides half of it.
    hidden_by_mask = 3.0 * ours.attention * LENGTH**2
    return counter.get_total_flops() - hidden_by_mask, ours.of_step([LENGTH], LENGTH, is_frozen=is_frozen)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    by_torch, ours = counted(name)
    assert ours == pytest.approx(by_torch, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v2"])
def test_frozen_weights_cost_no_gradient_of_their_own(name: str) -> None:
    by_torch, ours = counted(name, is_frozen=True)
    assert ours == pytest.approx(by_torch, rel=0.01)


def test_samples_and_trained_tokens_are_counted_by_themselves() -> None:
    flops = ModelFlops(products=1000, output=70, attention=5)
    assert flops.of_step([10, 20], 12) == 6 * (1000 * 30 + 70 * 12) + 3 * 5 * (100 + 400)
    assert flops.of_step([10, 20], 12, is_frozen=True) == 4 * (1000 * 30 + 70 * 12) + 3 * 5 * (100 + 400)


def test_a_dense_model_has_no_active_experts() -> None:
    assert active_experts(tiny_hf_model("llama")[1]) == 0
    assert active_experts(tiny_hf_model("mixtral")[1]) == 2
