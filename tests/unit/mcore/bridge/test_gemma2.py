from __future__ import annotations

import pytest
from transformers import Gemma2Config

from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import ConfigError
from tests.tiny_models import tiny_hf_model

FIELDS_OF_OLD_FILES = ("layer_types", "tie_word_embeddings", "attn_logit_softcapping", "final_logit_softcapping")


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    config = Gemma2Config(num_hidden_layers=5, vocab_size=500)
    given = {key: value for key, value in config.to_dict().items() if key not in FIELDS_OF_OLD_FILES}
    given |= {"architectures": ["Gemma2ForCausalLM"]}
    features = family_of_config(given).features(given)
    assert features.windows == (4096, None, 4096, None, 4096)
    assert (features.attention_softcap, features.logit_softcap) == (50.0, 30.0)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    assert dims_of(given).tied and config.tie_word_embeddings


def test_megatrons_config_has_the_models_scale_and_activation() -> None:
    hf, config = tiny_hf_model("gemma2")
    arguments = family_of_config(config).transformer_config(config)
    layer = hf.model.layers[0]
    assert arguments["softmax_scale"] == layer.self_attn.scaling == 20**-0.5
    assert arguments["layernorm_epsilon"] == layer.input_layernorm.eps
    assert (arguments["activation_func"], arguments["layernorm_zero_centered_gamma"]) == ("gelu_tanh", True)
    assert family_of_config(config).features(config).embedding_scale == hf.model.embed_tokens.scalar_embed_scale


def test_what_would_be_left_out_or_guessed_is_refused_at_once() -> None:
    config = tiny_hf_model("gemma2")[1] | {
        "head_dim": None,
        "query_pre_attn_scalar": -1,
        "attention_bias": True,
        "use_bidirectional_attention": True,
    }
    with pytest.raises(ConfigError) as caught:
        family_of_config(config).transformer_config(config)
    assert [problem.subject for problem in caught.value.problems] == [
        "config.json: head_dim",
        "config.json: query_pre_attn_scalar",
        "config.json: attention_bias",
        "config.json: use_bidirectional_attention",
    ]


def test_another_activation_is_refused() -> None:
    config = tiny_hf_model("gemma2")[1] | {"hidden_activation": "gelu"}
    with pytest.raises(ConfigError, match="hidden_activation: expected 'gelu_pytorch_tanh'"):
        family_of_config(config).transformer_config(config)
