"""Layouts that a run can't have, and balance of experts that its model hasn't, are refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema.experts import ExpertFields
from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.errors import InputError
from mcore.train.expert_options import balancing_problems
from mcore.train.recompute_options import recompute_problems
from tasks.model_folder import model_config_problems
from tasks.preflight import check_run
from tests.unit.tasks.model_folders import write_workspace

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}

WRONG: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "context parallelism over no processes": (
        2,
        {"context_parallel_size": 0},
        ["train.context_parallel_size: input should be greater than or equal to 1"],
    ),
    "context parallelism over more processes than there are": (
        2,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
        [
            "launch.nproc_per_node (2) must be a multiple of tensor_model_parallel_size x "
            "pipeline_model_parallel_size x context_parallel_size (4)"
        ],
    ),
    "experts of a dense model": (
        2,
        {"expert_model_parallel_size": 2},
        ["expert_model_parallel_size: expected 1, as the model has no experts, found 2"],
    ),
    "experts over the processes": (
        2,
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        [
            "launch.nproc_per_node (2) must be a multiple of expert_tensor_parallel_size x expert_model_parallel_size "
            "x pipeline_model_parallel_size (4)"
        ],
    ),
    "virtual stages without stages": (
        1,
        {"virtual_pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
        [
            "virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of 2 or more",
            "decoder_first_pipeline_num_layers needs pipeline_model_parallel_size of 2 or more",
        ],
    ),
    "virtual stages over the layers": (
        2,
        VPP2,
        ["num_hidden_layers: expected a multiple of pipeline x virtual pipeline parallel size (4), found 2"],
    ),
    "virtual stages over the micro-batches": (
        2,
        {**VPP2, "global_batch_size": 3},
        ["train.global_batch_size (3) must be a multiple of micro_batch_size x data parallel size x pipeline_model"],
    ),
    "virtual stages of adapters": (
        2,
        {**VPP2, "tuner_type": "lora", "save_safetensors": True},
        ["save_safetensors writes whole weights; tuner_type: lora has adapters only"],
    ),
    "more layers in a stage than there are": (
        2,
        {**PP2, "decoder_first_pipeline_num_layers": 2},
        ["num_hidden_layers: expected more than decoder_first_pipeline_num_layers take"],
    ),
    "layers of two stages that do not add up": (
        2,
        {**PP2, "decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 1},
        ["num_hidden_layers: expected decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers to add"],
    ),
    "balance without experts": (
        1,
        {"moe_z_loss_coeff": 0.1, "moe_router_bias_update_rate": 0.1},
        [
            "train.moe_z_loss_coeff: expected to be left out, as the model has no experts, found 0.1",
            "train.moe_router_bias_update_rate: expected to be left out",
        ],
    ),
    "half a balancing loss": (
        1,
        {"moe_aux_loss_coeff": 0.1},
        ["moe_router_load_balancing_type and moe_aux_loss_coeff belong together"],
    ),
    "a policy for nothing": (
        1,
        {"moe_token_drop_policy": "position"},
        ["moe_token_drop_policy needs moe_expert_capacity_factor"],
    ),
    "what else is wrong hides no layout": (
        2,
        {**VPP2, "lr": "fast", "expert_model_parallel_size": 2},
        [
            "train.lr: input",
            "num_hidden_layers: expected a multiple of pipeline x virtual",
            "expert_model_parallel_size: expected 1",
        ],
    ),
}


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    nproc, train, expected = WRONG[name]
    raw = json.loads(json.dumps(write_workspace(tmp_path)))
    raw["train"] |= train
    raw.setdefault("launch", {})["nproc_per_node"] = nproc
    with pytest.raises(InputError) as error:
        check_run(raw)
    text = "\n".join(str(problem) for problem in error.value.problems)
    for part in expected:
        assert text.count(part) == 1, text


def found(layout: Layout) -> list[str]:
    return [problem.subject for problem in model_config_problems(MOE, layout=layout)]


def test_experts_are_trained_with_a_divided_sequence_only() -> None:
    tp2 = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    assert found(Layout(**tp2)) == ["sequence_parallel"]
    assert found(Layout(**tp2, sequence_parallel=True)) == []


def test_every_way_to_divide_experts_that_fits_is_none_of_the_problems() -> None:
    assert found(Layout(expert_model_parallel_size=4, expert_tensor_parallel_size=2)) == []
    assert found(Layout(pipeline_model_parallel_size=2, decoder_last_pipeline_num_layers=2)) == []
    assert found(Layout(expert_model_parallel_size=3, expert_tensor_parallel_size=3)) == [
        "experts of a layer",
        "intermediate size of the experts",
    ]


def test_only_what_a_model_has_can_be_recomputed() -> None:
    def refused(hf_config: dict[str, Any], *modules: str) -> list[str]:
        asked = {"train_iters": 1, "recompute_granularity": "selective", "recompute_modules": modules}
        return [problem.found for problem in recompute_problems(TrainConfig.model_validate(asked), hf_config)]

    everything = ("core_attn", "mlp", "moe", "shared_experts", "mla_up_proj")
    dense = {**MOE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert refused(dense, *everything) == ["moe", "shared_experts", "mla_up_proj"]
    assert refused(MOE, *everything) == ["mlp", "shared_experts", "mla_up_proj"]


def test_only_routers_with_a_bias_have_one_to_update() -> None:
    (problem,) = balancing_problems(ExpertFields(moe_router_bias_update_rate=0.1), MOE)
    assert problem.subject == "train.moe_router_bias_update_rate"
    balanced = ExpertFields(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1)
    assert balancing_problems(balanced, MOE) == []
