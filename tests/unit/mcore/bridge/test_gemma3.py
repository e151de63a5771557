from __future__ import annotations

import pytest
from transformers import Gemma3TextConfig

from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import ConfigError
from tests.tiny_models import tiny_hf_model


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    config = Gemma3TextConfig(num_hidden_layers=7, vocab_size=500)
    given = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "tie_word_embeddings")}
    given |= {"architectures": ["Gemma3ForCausalLM"]}
    features = family_of_config(given).features(given)
    assert features.windows == (4096,) * 5 + (None, 4096)
    assert features.rope_of_layer == tuple(config.layer_types)
    assert dims_of(given).tied and config.tie_word_embeddings


def test_the_pattern_of_old_files_is_read() -> None:
    """`sliding_window_pattern` without `layer_types`, as the published models have it."""
    hf, config = tiny_hf_model("gemma3")
    del config["layer_types"]
    features = family_of_config(config).features(config | {"sliding_window_pattern": 3})
    assert features.windows == (7, 7, None, 7)
    assert features.rope_of_layer == tuple(hf.config.layer_types)


def test_a_cap_on_scores_is_refused_and_one_on_logits_is_not() -> None:
    config = tiny_hf_model("gemma3")[1]
    assert family_of_config(config).features(config | {"final_logit_softcapping": 30.0}).logit_softcap == 30.0
    with pytest.raises(ConfigError, match="attn_logit_softcapping: expected null"):
        family_of_config(config).transformer_config(config | {"attn_logit_softcapping": 50.0})


def test_models_with_eyes_are_not_supported() -> None:
    with pytest.raises(ConfigError, match="Gemma3ForConditionalGeneration"):
        family_of_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}})
