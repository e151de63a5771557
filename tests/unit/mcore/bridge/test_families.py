from __future__ import annotations

import subprocess
import sys

import pytest

from mcore.bridge.families import SUPPORTED, family_of, family_of_config
from mcore.errors import ConfigError
from tests.tiny_dense import DENSE
from tests.tiny_models import MODELS, tiny_hf_model
from tests.tiny_normed import NORMED


def problems_of(config):
    with pytest.raises(ConfigError) as caught:
        family_of_config(config).transformer_config(config)
    return {problem.subject for problem in caught.value.problems}


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_every_supported_architecture_has_a_family(architecture):
    family = family_of(architecture)
    assert (family.hf_architecture, family.name) == (architecture, SUPPORTED[architecture])


@pytest.mark.parametrize("name", MODELS)
def test_megatrons_config_says_what_transformers_says(name):
    model, config = tiny_hf_model(name)
    arguments = family_of_config(config).transformer_config(config)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert arguments["num_layers"] == len(model.model.layers)
    assert arguments["hidden_size"] == model.model.embed_tokens.embedding_dim
    assert arguments["ffn_hidden_size"] == mlp.gate_proj.out_features
    assert arguments["kv_channels"] == attention.head_dim
    assert arguments["num_attention_heads"] * attention.head_dim == attention.q_proj.out_features
    assert arguments["num_query_groups"] * attention.head_dim == attention.k_proj.out_features
    assert arguments["layernorm_epsilon"] == model.model.norm.variance_epsilon
    assert arguments["qk_layernorm"] == hasattr(attention, "q_norm")
    assert arguments["add_bias_linear"] == (attention.o_proj.bias is not None) == (mlp.down_proj.bias is not None)
    assert (arguments["add_qkv_bias"] or arguments["add_bias_linear"]) == (attention.q_proj.bias is not None)
    assert arguments["hidden_dropout"] == arguments["attention_dropout"] == 0.0
    assert (arguments["activation_func"], arguments["normalization"]) == ("silu", "RMSNorm")


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        family_of_config({"architectures": ["MambaForCausalLM"]})
    assert all(known in str(caught.value) for known in SUPPORTED)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", ["LlamaForCausalLM", "Qwen2ForCausalLM"]])
def test_the_architecture_must_be_told(architectures):
    with pytest.raises(ConfigError, match="can't be told"):
        family_of_config({"architectures": architectures})


def test_features_that_would_be_left_out_are_refused_at_once():
    _, config = tiny_hf_model("qwen2")
    config |= {
        "hidden_act": "gelu",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": None,
    }
    assert problems_of(config) == {
        "config.json: hidden_act",
        "config.json: partial_rotary_factor",
        "config.json: rms_norm_eps",
    }


def test_a_partial_rotary_factor_among_the_rope_parameters_is_seen():
    _, config = tiny_hf_model("llama")
    config["rope_parameters"] = dict(config["rope_parameters"]) | {"partial_rotary_factor": 0.25}
    assert problems_of(config) == {"config.json: rope_parameters.partial_rotary_factor"}


@pytest.mark.parametrize("name", [*MODELS, *DENSE, *NORMED])
def test_biases_are_where_transformers_has_them(name):
    model, config = tiny_hf_model(name)
    family = family_of_config(config)
    arguments, features = family.transformer_config(config), family.features(config)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    everywhere = arguments["add_bias_linear"]
    on_qkv, on_o = features.attention_input_bias, features.attention_output_bias
    qkv = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj
    assert (everywhere or arguments["add_qkv_bias"] if on_qkv is None else on_qkv) == (qkv.bias is not None)
    assert (everywhere if on_o is None else on_o) == (attention.o_proj.bias is not None)
    assert everywhere == (mlp.down_proj.bias is not None)


def test_qwen3_without_head_dim_is_refused():
    _, config = tiny_hf_model("qwen3")
    assert problems_of(config | {"head_dim": None}) == {"config.json: head_dim"}


def test_phi3_may_turn_a_part_of_each_head():
    _, config = tiny_hf_model("phi4_partial")
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.75
    family_of_config(config).transformer_config(config)


def test_families_plans_and_headers_come_without_torch():
    code = (
        "import sys\n"
        "from mcore.bridge import families, hf_config, hf_headers, plan\n"
        "from mcore.sources import resolve\n"
        "[families.family_of(architecture) for architecture in families.SUPPORTED]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
