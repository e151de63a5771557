from __future__ import annotations

import pytest

from mcore.bridge.dims import ModelDims
from mcore.errors import ConfigError

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 250,
}


def test_sizes_are_read_from_the_config():
    dims = ModelDims.from_hf_config(CONFIG | {"head_dim": 24}, make_vocab_size_divisible_by=128)
    assert (dims.num_layers, dims.hidden, dims.ffn, dims.vocab, dims.padded_vocab) == (3, 64, 96, 250, 256)
    assert (dims.heads, dims.groups, dims.head_dim, dims.heads_per_group) == (8, 2, 24, 4)
    assert dims.shape("qkv_rows hidden") == ((8 + 2 * 2) * 24, 64)
    assert dims.shape("gate_up_rows hidden") == (192, 64)
    assert dims.shape("hidden q_rows") == (64, 192)
    assert dims.untied


@pytest.mark.parametrize("absent", [{}, {"head_dim": None, "num_key_value_heads": None}])
def test_absent_sizes_follow_from_the_others(absent):
    config = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"} | absent
    dims = ModelDims.from_hf_config(config)
    assert (dims.head_dim, dims.groups) == (8, 8)


def test_a_vocabulary_that_divides_is_not_padded():
    assert ModelDims.from_hf_config(CONFIG | {"vocab_size": 256}, make_vocab_size_divisible_by=128).padded_vocab == 256


def test_everything_missing_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        ModelDims.from_hf_config({"hidden_size": "64", "vocab_size": True, "head_dim": -1, "num_attention_heads": 8})
    subjects = {problem.subject for problem in caught.value.problems}
    assert subjects == {
        "config.json: hidden_size",
        "config.json: intermediate_size",
        "config.json: num_hidden_layers",
        "config.json: vocab_size",
        "config.json: head_dim",
    }


def test_sizes_that_do_not_divide_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        ModelDims.from_hf_config(CONFIG | {"num_key_value_heads": 3, "hidden_size": 60})
    subjects = [problem.subject for problem in caught.value.problems]
    assert subjects == ["config.json: num_key_value_heads", "config.json: hidden_size"]
