from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore.backend.rope import inverse_frequencies
from mcore.errors import ConfigError
from tests.tiny_models import LINEAR_ROPE, LLAMA3_ROPE, MODELS, SIZES, tiny_hf_model

OLD_STYLE = {
    "default": ({}, {"rope_type": "default"}),
    "linear": ({"type": "linear", "factor": 4.0}, LINEAR_ROPE),
    "llama3": ({key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}, LLAMA3_ROPE),
}


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_the_reference_model(name: str) -> None:
    model, config = tiny_hf_model(name)
    assert torch.equal(inverse_frequencies(config), model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", OLD_STYLE)
def test_configs_of_older_transformers_mean_the_same(kind: str) -> None:
    scaling, rope = OLD_STYLE[kind]
    theta = rope.get("rope_theta", 20000.0)
    old = {"model_type": "llama", **SIZES, "rope_theta": theta, "rope_scaling": scaling or None}
    new = {"model_type": "llama", **SIZES, "rope_parameters": {**rope, "rope_theta": theta}}
    assert torch.equal(inverse_frequencies(old), inverse_frequencies(new))


def test_the_scalings_differ_in_every_band() -> None:
    """Else the tests above would not see one taken for another."""
    kinds = [inverse_frequencies(tiny_hf_model(name)[1]) for name in ("llama", "llama3", "llama_linear")]
    assert (kinds[0][:2] == kinds[1][:2]).any() and (kinds[0][-2:] != kinds[1][-2:]).all()
    assert (kinds[0] != kinds[2]).all()


@pytest.mark.parametrize(
    ("field", "rope"),
    [
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "mrope", "mrope_section": [2, 1, 1]}),
    ],
)
def test_scalings_that_need_more_are_refused_by_field(field: str, rope: dict) -> None:
    with pytest.raises(ConfigError, match=rf"config.json: {field}.rope_type: expected one of default, linear, llama3"):
        inverse_frequencies({"model_type": "llama", **SIZES, field: rope})


def test_a_config_that_transformers_refuses_is_an_input_error() -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        inverse_frequencies({"model_type": "qwen2", **SIZES, "layer_types": ["full_attention"]})


def test_llama3_without_its_numbers_is_an_input_error() -> None:
    with pytest.raises(ConfigError, match="factor"):
        inverse_frequencies({"model_type": "llama", **SIZES, "rope_parameters": {"rope_type": "llama3"}})


def test_frequencies_stay_fp32_whatever_the_default_dtype_is() -> None:
    config = tiny_hf_model("llama")[1]
    expected = LlamaRotaryEmbedding(tiny_hf_model("llama")[0].config).inv_freq
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(inverse_frequencies(config), expected)
    finally:
        torch.set_default_dtype(torch.float32)
