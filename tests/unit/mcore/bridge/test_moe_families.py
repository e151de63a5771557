"""Families with experts: there and back to the bit, experts stacked on disk, and what their configs mean."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.plan import mcore_shapes_of
from mcore.errors import ConfigError, WeightPlanError
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.tiny_models import tiny_hf_model
from tests.tiny_moe import MOE

EXPERTS = "model.layers.1.mlp.experts."


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        dims_of(config), family_of_config(config).transformer_config(config)
    return [problem.subject for problem in caught.value.problems]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MOE)
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config = write_hf_folder(tmp_path / "hf", name, dtype=dtype)
    figures = convert(tmp_path / "hf", tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    before = weights_of(tmp_path / "hf")
    assert figures["num_tensors"] == len(before)
    assert_same_weights(weights_of(tmp_path / "back"), before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_experts_may_be_stacked_on_disk(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", "qwen3_moe")
    (tmp_path / "stacked").mkdir()
    (tmp_path / "stacked" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    state = dict(tiny_hf_model("qwen3_moe")[0].state_dict())  # in memory transformers stacks them
    assert state[EXPERTS + "gate_up_proj"].shape == (8, 80, 64)
    save_file(state, tmp_path / "stacked" / "model.safetensors")
    for folder in ("hf", "stacked"):
        convert(tmp_path / folder, tmp_path / f"{folder}_mcore")
        export(tmp_path / f"{folder}_mcore", tmp_path / f"{folder}_back")
    assert_same_weights(weights_of(tmp_path / "stacked_back"), weights_of(tmp_path / "hf_back"))


def test_a_missing_expert_and_one_too_many_are_named(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", "qwen3_moe")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights[EXPERTS + "8.up_proj.weight"] = weights.pop(EXPERTS + "7.up_proj.weight")
    save_file(weights, file)
    with pytest.raises(WeightPlanError) as caught:
        convert(tmp_path / "hf", tmp_path / "mcore")
    assert {problem.subject for problem in caught.value.problems} == {
        f"hf {EXPERTS}7.up_proj.weight",
        f"hf {EXPERTS}8.up_proj.weight",
    }


@pytest.mark.parametrize("name", MOE)
def test_megatrons_config_says_what_transformers_says(name: str) -> None:
    model, config = tiny_hf_model(name)
    arguments, dims = family_of_config(config).transformer_config(config), dims_of(config)
    mlps = [layer.mlp for layer in model.model.layers]
    moe = [mlp for mlp in mlps if hasattr(mlp, "experts")]
    assert list(dims.moe_layers) == [mlp in moe for mlp in mlps]
    assert arguments["moe_layer_freq"] == (1 if len(moe) == len(mlps) else [int(mlp in moe) for mlp in mlps])
    router = moe[0].router if name == "gpt_oss" else moe[0].gate
    assert arguments["num_moe_experts"] == router.num_experts
    assert arguments["moe_router_topk"] == router.top_k
    assert arguments["moe_router_pre_softmax"] == (not getattr(router, "norm_topk_prob", True))
    num_columns = math.prod(moe[0].experts.down_proj.shape) // router.num_experts // dims.hidden
    assert arguments["moe_ffn_hidden_size"] == num_columns
    shared = getattr(moe[0], "shared_expert", None)
    assert arguments.get("moe_shared_expert_intermediate_size") == (shared and shared.up_proj.out_features)


def published(architecture: str, **sizes: Any) -> dict[str, Any]:
    return {"architectures": [f"{architecture}ForCausalLM"], "rms_norm_eps": 1e-5, "hidden_act": "silu", **sizes}


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        pytest.param(
            published(
                "Mixtral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                num_hidden_layers=32, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
            ),
            46_702_792_704,
            id="Mixtral-8x7B",
        ),
        pytest.param(
            published(
                "Qwen2Moe", hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=16,
                num_hidden_layers=24, vocab_size=151936, num_experts=60, num_experts_per_tok=4,
                moe_intermediate_size=1408, shared_expert_intermediate_size=5632, use_sliding_window=False,
                sliding_window=32768,
            ),
            14_315_784_192,
            id="Qwen1.5-MoE-A2.7B",
        ),
        pytest.param(
            published(
                "Qwen3Moe", hidden_size=2048, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4,
                head_dim=128, num_hidden_layers=48, vocab_size=151936, num_experts=128, num_experts_per_tok=8,
                moe_intermediate_size=768, norm_topk_prob=True, mlp_only_layers=[],
            ),
            30_532_122_624,
            id="Qwen3-30B-A3B",
        ),
        pytest.param(
            published(
                "Olmoe", hidden_size=2048, intermediate_size=1024, num_attention_heads=16, num_key_value_heads=16,
                num_hidden_layers=16, vocab_size=50304, num_experts=64, num_experts_per_tok=8,
            ),
            6_919_161_856,
            id="OLMoE-1B-7B",
        ),
        pytest.param(
            published(
                "GptOss", hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8,
                head_dim=64, num_hidden_layers=24, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4,
                attention_bias=True, sliding_window=128, swiglu_limit=7.0,
            ),
            20_914_757_184,
            id="gpt-oss-20b",
        ),
    ],
)  # fmt: skip
def test_a_published_model_has_as_many_parameters_as_its_card_says(config: dict[str, Any], num_parameters: int) -> None:
    family, dims = family_of_config(config), dims_of(config)
    assert sum(math.prod(shape) for shape in mcore_shapes_of(family, dims).values()) == num_parameters


def test_the_number_of_experts_goes_by_two_names() -> None:
    config = tiny_hf_model("qwen3_moe")[1]
    other = {key: value for key, value in config.items() if key not in ("num_experts", "num_local_experts")}
    for names in (["num_experts"], ["num_local_experts"], ["num_experts", "num_local_experts"]):
        assert dims_of(other | dict.fromkeys(names, 8)).size("experts") == 8
    assert problems_of(other | {"num_experts": 8, "num_local_experts": 4}) == [
        "config.json: num_experts, num_local_experts"
    ]


def test_a_model_whose_layers_are_all_dense_has_no_experts() -> None:
    config = tiny_hf_model("qwen3_moe")[1] | {"mlp_only_layers": [0, 1, 2, 3]}
    assert "num_moe_experts" not in family_of_config(config).transformer_config(config)
    assert not any(dims_of(config).moe_layers)


def test_sizes_that_are_missing_are_named_at_once() -> None:
    config = tiny_hf_model("qwen3_moe")[1]
    config |= {"num_experts": None, "num_local_experts": None, "moe_intermediate_size": 0}
    assert problems_of(config) == ["config.json: num_experts", "config.json: moe_intermediate_size"]


@pytest.mark.parametrize("chosen", [0, 1, 9, None])
def test_a_token_goes_to_a_number_of_experts_that_can_be_built(chosen: int | None) -> None:
    config = tiny_hf_model("qwen3_moe")[1] | {"num_experts_per_tok": chosen}
    assert problems_of(config) == ["config.json: num_experts_per_tok"]
    if chosen == 1:
        family_of_config(config).transformer_config(config | {"norm_topk_prob": False})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("olmoe", {"clip_qkv": 8.0}),
        ("gpt_oss", {"swiglu_alpha": 1.0}),
        ("gpt_oss", {"swiglu_limit": None}),
        ("gpt_oss", {"attention_bias": False}),
    ],
)
def test_what_can_not_be_built_is_refused(name: str, change: dict[str, Any]) -> None:
    assert problems_of(tiny_hf_model(name)[1] | change) == [f"config.json: {key}" for key in change]
