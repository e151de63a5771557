from __future__ import annotations

import pytest
from transformers import Glm4Config

from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import ConfigError
from tests.tiny_models import tiny_hf_model


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    config = Glm4Config(num_hidden_layers=2, vocab_size=500)
    given = {key: value for key, value in config.to_dict().items() if key != "attention_bias"}
    given |= {"architectures": ["Glm4ForCausalLM"]}
    assert dims_of(given).attention_bias and config.attention_bias
    assert family_of_config(given).transformer_config(given)["add_qkv_bias"]


def test_pairs_of_a_head_are_turned() -> None:
    config = tiny_hf_model("glm4")[1]
    assert family_of_config(config).transformer_config(config)["rotary_interleaved"]


def test_a_head_size_that_would_be_guessed_is_refused() -> None:
    config = tiny_hf_model("glm4")[1] | {"head_dim": None}
    with pytest.raises(ConfigError, match="head_dim: expected a number"):
        family_of_config(config).transformer_config(config)
