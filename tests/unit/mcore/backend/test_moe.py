"""Models with experts against transformers: logits, losses, gradients, and where their routers send tokens.

B batch, S sequence, T tokens (B * S), E experts, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.bridge.families import dims_of
from mcore.errors import ConfigError
from tests.tiny_models import PADDED_VOCAB_SIZE, mcore_tensors, tiny_hf_model
from tests.tiny_moe import MOE
from tests.unit.mcore.backend.test_model import (
    IDS_BS,
    MAX_RELATIVE_ERROR,
    POSITIONS_BS,
    VOCAB_SIZE,
    logits_of,
    mcore_model,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("name", MOE)
def test_logits_equal_those_of_the_reference_model(name: str) -> None:
    hf, config = tiny_hf_model(name)
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config))
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) < MAX_RELATIVE_ERROR


@pytest.mark.parametrize("name", MOE)
def test_every_expert_is_reached_and_no_choice_is_a_close_one(name: str) -> None:
    """What the test above needs: an expert without tokens proves nothing, and a tie may fall either way."""
    hf, config = tiny_hf_model(name)
    model, seen = mcore_model(hf, config).eval(), []
    for layer in model.decoder.layers:
        if layer.is_moe_layer:
            layer.mlp.router.register_forward_hook(lambda router, inputs, output: seen.append((router, inputs, output)))
    with torch.no_grad():
        model(IDS_BS, POSITIONS_BS, None)
    assert len(seen) == sum(dims_of(config).moe_layers)
    for router, (hidden_SBH, *_), (_, chosen_TE) in seen:
        assert (chosen_TE.sum(0) > 0).all()
        ranked_TE = router.gating(hidden_SBH).flatten(0, 1).sort(dim=-1, descending=True).values
        assert (ranked_TE[:, router.topk - 1] - ranked_TE[:, router.topk]).min() > 2e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe_bias", "gpt_oss"])
def test_bf16_is_no_further_from_the_reference_than_its_own_bf16(name: str) -> None:
    hf, config = tiny_hf_model(name, dtype=torch.bfloat16)
    with torch.no_grad():
        exact_BSV, own_BSV = tiny_hf_model(name)[0](IDS_BS).logits, hf(IDS_BS).logits.float()
        logits_BSP = mcore_model(hf, config, params_dtype=torch.bfloat16).eval()(IDS_BS, POSITIONS_BS, None)
    # Rounding sends some tokens to other experts, here and there, so it's the typical token that is compared.
    noise, error = (
        (exact_BSV - found_BSV).abs().amax(-1).median() for found_BSV in (own_BSV, logits_BSP[..., :VOCAB_SIZE].float())
    )
    assert noise > 1e-3 and error < 1.5 * noise


@pytest.mark.parametrize("name", MOE)
def test_losses_and_gradients_equal_those_of_the_reference_model(name: str) -> None:
    hf, config = tiny_hf_model(name)
    model, labels_BS = mcore_model(hf, config).train(), IDS_BS.roll(-1, dims=1)

    losses_BS = model(IDS_BS, POSITIONS_BS, None, labels=labels_BS)
    losses_BS.mean().backward()
    expected_BS = F.cross_entropy(hf(IDS_BS).logits.transpose(1, 2), labels_BS, reduction="none")
    expected_BS.mean().backward()

    torch.testing.assert_close(losses_BS, expected_BS, atol=2e-5, rtol=0)
    for weights in (hf, model):
        for parameter in weights.parameters():
            parameter.data = parameter.grad
    expected = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    compared = set()
    for part in parts_of(model):
        reference = expected[part.key][part.global_slice()].reshape(part.data.shape)
        assert relative_error(reference, part.data) < 1e-4, part.key
        compared.add(part.key)
    assert compared == expected.keys()


def parts_of(model: GPTModel) -> list[ShardedTensor]:
    state = model.sharded_state_dict()
    apply_factories(state)
    return [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mixtral", {"num_experts_per_tok": 3}),
        ("mixtral_window", {"sliding_window": 13}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen2_moe_mixed", {"norm_topk_prob": False}),
        ("qwen2_moe_mixed", {"max_window_layers": 3, "layer_types": None}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe_mixed", {"sliding_window": 11}),
        ("olmoe", {"norm_topk_prob": True}),
        ("gpt_oss", {"swiglu_limit": 1.6}),
        ("gpt_oss", {"sliding_window": 13}),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ],
)
def test_a_wrong_config_is_seen(name: str, change: dict[str, Any]) -> None:
    hf, config = tiny_hf_model(name)
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config, build_config=config | change))
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) > 1e-3


@pytest.mark.parametrize(
    ("name", "layout", "reason"),
    [
        ("mixtral", Layout(expert_model_parallel_size=3), "experts of a layer: expected a multiple"),
        ("gpt_oss", Layout(tensor_model_parallel_size=2), "expert_tensor_parallel_size: expected 1"),
    ],
)
def test_a_layout_that_does_not_fit_the_experts_is_an_input_error(name: str, layout: Layout, reason: str) -> None:
    config = tiny_hf_model(name)[1]
    with pytest.raises(ConfigError, match=reason):
        build_model(config, padded_vocab_size=384, layout=layout, params_dtype=torch.float32, backend="torch")
