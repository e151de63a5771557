from __future__ import annotations

import pytest

from mcore.bridge.hf_quantised import Quantisation, method_of, quantisation_of
from mcore.errors import ConfigError


def config(**quantisation):
    return {"quantization_config": quantisation}


def compressed(**weights):
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, **weights}
    return config(quant_method="compressed-tensors", config_groups={"group_0": {"weights": scheme}})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, None),
        (config(quant_method="gptq", bits=4), None),
        (config(bits=4), None),
        ({"quantization_config": None}, None),
        (config(quant_method="mxfp4"), Quantisation("mxfp4")),
        (config(quant_method="fp8", weight_block_size=[128, 64]), Quantisation("fp8", (128, 64))),
        (config(quant_method="fp8", weight_block_size=None), Quantisation("fp8", (None, None))),
        (compressed(strategy="tensor"), Quantisation("compressed-tensors", (None, None))),
        (compressed(strategy="channel"), Quantisation("compressed-tensors", (1, None))),
        (compressed(strategy="block", block_structure=[128, 128]), Quantisation("compressed-tensors", (128, 128))),
    ],
)
def test_what_a_config_says(found, expected):
    assert quantisation_of(found) == expected


@pytest.mark.parametrize(
    "found",
    [
        config(quant_method="fp8"),
        config(quant_method="fp8", weight_block_size=128),
        config(quant_method="compressed-tensors", config_groups={}),
        config(quant_method="compressed-tensors", config_groups={"group_0": {"weights": None}}),
        config(quant_method="compressed-tensors", config_groups=[1]),
        compressed(strategy="group", group_size=32),
        compressed(strategy="block"),
        compressed(strategy="channel", num_bits=4),
        compressed(strategy="channel", type="int"),
        compressed(strategy="channel", symmetric=False),
    ],
)
def test_what_can_not_be_understood_is_refused(found):
    with pytest.raises(ConfigError, match="quantisation can't be read"):
        quantisation_of(found)


def test_groups_that_differ_are_refused():
    found = compressed(strategy="channel")
    groups = found["quantization_config"]["config_groups"]
    groups["group_1"] = {"weights": {**groups["group_0"]["weights"], "strategy": "tensor"}}
    with pytest.raises(ConfigError, match="the same symmetric 8-bit float weights in every group"):
        quantisation_of(found)


def test_the_method_is_named_even_if_it_is_not_known():
    assert method_of(config(quant_method="awq")) == "awq"
    assert method_of({}) is None


def test_blocks_are_as_large_as_the_weight_where_all_of_it_shares_a_scale():
    assert Quantisation("fp8", (128, 64)).block_of((576, 7168)) == (128, 64)
    assert Quantisation("fp8").block_of((576, 7168)) == (576, 7168)
    assert Quantisation("compressed-tensors", (1, None)).block_of((576, 7168)) == (1, 7168)
