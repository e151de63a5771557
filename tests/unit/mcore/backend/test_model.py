"""megatron-core's model against transformers: logits, losses and gradients of the same weights.

B batch, S sequence, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.plan import steps_of
from mcore.errors import ConfigError
from tests.tiny_models import MODELS, PADDED_VOCAB_SIZE, SIZES, fill, mcore_tensors, tiny_hf_model
from tests.tiny_normed import NORMED

pytestmark = pytest.mark.usefixtures("alone")

MAX_RELATIVE_ERROR = 2e-5
"""Of fp32 logits, as a fraction of their standard deviation."""
VOCAB_SIZE = SIZES["vocab_size"]
IDS_BS = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
POSITIONS_BS = torch.arange(40).expand(2, -1)


def mcore_model(
    hf: torch.nn.Module, hf_config: dict[str, Any], *, build_config: dict[str, Any] | None = None, **options: Any
) -> GPTModel:
    arguments = {"params_dtype": torch.float32, "padded_vocab_size": PADDED_VOCAB_SIZE, **options}
    model = build_model(build_config or hf_config, layout=Layout(), backend="torch", **arguments)
    fill(model, mcore_tensors(hf, hf_config, padded_vocab_size=arguments["padded_vocab_size"]))
    return model


def relative_error(reference: torch.Tensor, found: torch.Tensor) -> float:
    return ((reference - found).abs().max() / reference.std()).item()


@torch.no_grad()
def logits_of(hf: torch.nn.Module, model: GPTModel) -> tuple[torch.Tensor, torch.Tensor]:
    return hf(IDS_BS).logits, model.eval()(IDS_BS, POSITIONS_BS, None)


@pytest.mark.parametrize("name", [*MODELS, *NORMED])
def test_logits_equal_those_of_the_reference_model(name: str) -> None:
    hf, config = tiny_hf_model(name)
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config))
    assert logits_BSP.shape[-1] == PADDED_VOCAB_SIZE
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) < MAX_RELATIVE_ERROR


@pytest.mark.parametrize("name", [*MODELS, *NORMED])
def test_bf16_is_no_further_from_the_reference_than_its_own_bf16(name: str) -> None:
    hf, config = tiny_hf_model(name, dtype=torch.bfloat16)
    exact = hf(IDS_BS).logits.float(), mcore_model(hf, config, params_dtype=torch.bfloat16)
    logits_BSV, logits_BSP = logits_of(tiny_hf_model(name)[0], exact[1])
    noise, error = relative_error(logits_BSV, exact[0]), relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE])
    assert logits_BSP.dtype == torch.bfloat16
    assert noise > 1e-3 and error < 1.5 * noise


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
        ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama_linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": 2.1}),
        ("gemma2", {"final_logit_softcapping": 3.1}),
        ("gemma2", {"sliding_window": 8}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gemma2_uncapped", {"query_pre_attn_scalar": 12}),
        ("gemma3", {"sliding_window": 6}),
        ("gemma3", {"layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
        ("glm4", {"partial_rotary_factor": 0.25, "rope_parameters": None}),
    ],
)
def test_a_wrong_config_is_seen(name: str, change: dict[str, Any]) -> None:
    hf, config = tiny_hf_model(name)
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config, build_config=config | change))
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) > 1e-3


@pytest.mark.parametrize("recompute", [{}, {"granularity": "selective"}, {"granularity": "full", "method": "uniform"}])
@pytest.mark.parametrize("name", ["llama_bias", "llama3", "qwen3", *NORMED])
def test_losses_and_gradients_equal_those_of_the_reference_model(name: str, recompute: dict[str, str]) -> None:
    """With padding in the vocabulary, of which the reference model knows nothing."""
    options: dict[str, Any] = {f"recompute_{key}": value for key, value in recompute.items()}
    if "method" in recompute:
        options["recompute_num_layers"] = 1
    hf, config = tiny_hf_model(name)
    model = mcore_model(hf, config, **options).train()
    labels_BS = IDS_BS.roll(-1, dims=1)

    losses_BS = model(IDS_BS, POSITIONS_BS, None, labels=labels_BS)
    losses_BS.mean().backward()
    expected_BS = F.cross_entropy(hf(IDS_BS).logits.transpose(1, 2), labels_BS, reduction="none")
    expected_BS.mean().backward()

    torch.testing.assert_close(losses_BS, expected_BS, atol=2e-5, rtol=0)
    dims = dims_of(config, make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    gradients = {key: parameter.grad for key, parameter in hf.named_parameters()}
    parameters = dict(model.named_parameters())
    for step in steps_of(family_of_config(config), dims):
        name = local_name(step.rule.mcore).replace("{L}", str(step.index[0] if step.index else ""))
        for hf_name, part in zip(step.hf_names, step.rule.to_hf(parameters[name].grad, dims), strict=True):
            assert relative_error(gradients[hf_name], part) < 1e-4, hf_name
    for weight in (model.embedding.word_embeddings.weight, model.shared_embedding_or_output_weight()):
        assert weight.grad[VOCAB_SIZE:].abs().max() == 0


def local_name(mcore_name: str) -> str:
    """Name inside the local spec's module tree of a norm that a checkpoint names after the layer behind it."""
    return mcore_name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def test_without_the_mask_padding_would_change_the_loss() -> None:
    """The control of the test above."""
    hf, config = tiny_hf_model("llama")
    model = mcore_model(hf, config)
    masked = model(IDS_BS, POSITIONS_BS, None, labels=IDS_BS)
    model.output_layer._forward_hooks.clear()
    assert (model(IDS_BS, POSITIONS_BS, None, labels=IDS_BS) - masked).min() > 0.01


@pytest.mark.parametrize("padded_vocab_size", [VOCAB_SIZE, VOCAB_SIZE + 1, 1024])
def test_logits_of_padding_are_never_the_largest_and_never_infinite(padded_vocab_size: int) -> None:
    hf, config = tiny_hf_model("qwen3_tied")
    logits_BSP = logits_of(hf, mcore_model(hf, config, padded_vocab_size=padded_vocab_size))[1]
    assert logits_BSP.isfinite().all()
    assert logits_BSP.softmax(-1)[..., VOCAB_SIZE:].sum() == 0
    assert logits_BSP[..., :VOCAB_SIZE].abs().max() < 100


def test_weights_are_nan_until_they_are_loaded() -> None:
    config = tiny_hf_model("llama_bias")[1]
    model = build_model(config, padded_vocab_size=256, layout=Layout(), params_dtype=torch.bfloat16, backend="torch")
    assert all(parameter.isnan().all() and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model(IDS_BS, POSITIONS_BS, None).float()[..., :VOCAB_SIZE].isnan().all()


def test_rotary_angles_stay_fp32_when_the_model_is_cast() -> None:
    hf, config = tiny_hf_model("llama")
    model = mcore_model(hf, config).bfloat16()
    expected = torch.outer(torch.arange(4.0), hf.model.rotary_emb.inv_freq)
    assert torch.equal(model.rotary_pos_emb(4)[:, 0, 0, : expected.shape[1]], expected)


@pytest.mark.parametrize(
    ("change", "layout", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, Layout(), "GPT2LMHeadModel"),
        ({}, Layout(tensor_model_parallel_size=3), "num_key_value_heads: expected a multiple"),
        ({}, Layout(pipeline_model_parallel_size=3), "num_hidden_layers: expected a multiple"),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}, Layout(), "rope_parameters.rope_type"),
        ({"hidden_act": "gelu"}, Layout(), "hidden_act"),
    ],
)
def test_what_can_not_be_built_is_an_input_error(change: dict[str, Any], layout: Layout, reason: str) -> None:
    config = tiny_hf_model("llama")[1] | change
    with pytest.raises(ConfigError, match=reason):
        build_model(config, padded_vocab_size=384, layout=layout, params_dtype=torch.float32, backend="torch")
