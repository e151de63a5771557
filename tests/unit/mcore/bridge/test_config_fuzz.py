"""Fields of `config.json` taken away, nulled and changed, one at a time: refused, or built as transformers builds it.

Weights stay the same. A config whose files would hold other names or shapes is refused by the plan.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.check import check
from mcore.bridge.config_kinds import kind_problems
from mcore.bridge.families import config_findings, dims_of, family_of_config
from mcore.bridge.plan import steps_of
from mcore.errors import InputError
from tests.hf_folders import write_hf_folder
from tests.tiny_dense import DENSE
from tests.tiny_latent import LATENT_MODELS
from tests.tiny_models import MODELS, PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model
from tests.tiny_moe import MOE
from tests.tiny_normed import NORMED

ALL = [*MODELS, *DENSE, *NORMED, *LATENT_MODELS, *MOE]
ONE_OF_EACH_FAMILY = (
    "llama_yarn", "mistral", "ministral", "ministral3", "qwen2_window", "qwen3_window", "phi3_long", "gemma2", "gemma3",
    "glm4", "olmo2", "mixtral", "qwen2_moe_mixed", "qwen3_moe_mixed", "olmoe", "gpt_oss", "deepseek_v2", "moonlight",
    "glm4_moe",
)  # fmt: skip
NUM_SAMPLED = 30

NOT_OF_THE_DECODER = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "hidden_size",
    "num_hidden_layers", "vocab_size", "id2label", "label2id", "initializer_range", "is_encoder_decoder",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version", "use_cache",
    "chunk_size_feed_forward", "output_router_logits", "router_aux_loss_coef", "model_type",
}  # fmt: skip
"""Keys that say nothing of what a decoder computes, or whose change makes another model of it."""
ALTERNATING = ["full_attention", "sliding_attention"] * 2
SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (True, False),
    "attn_logit_softcapping": (1.0,),
    "clip_qkv": (0.1,),
    "decoder_sparse_step": (0, 2),
    "final_logit_softcapping": (1.0,),
    "first_k_dense_replace": (2,),
    "head_dim": (16,),
    "hidden_act": ("gelu", "relu"),
    "hidden_activation": ("gelu", "silu"),
    "is_causal": (False, None),
    "layer_types": (ALTERNATING, ALTERNATING[::-1]),
    "max_position_embeddings": (8, 20),
    "max_window_layers": (1,),
    "mlp_bias": (True,),
    "mlp_only_layers": ([1],),
    "model_type": ("llama", "qwen3", "mixtral"),
    "moe_layer_freq": (2,),
    "n_group": (1, 2, 3, None),
    "norm_topk_prob": (True, False),
    "num_experts": (2,),
    "num_experts_per_tok": (3, 5, 7),
    "num_local_experts": (2,),
    "original_max_position_embeddings": (8,),
    "partial_rotary_factor": (0.5, 1.5),
    "per_layer_config": ({"1": {"rms_norm_eps": 0.5}},),
    "q_lora_rank": (None,),
    "qkv_bias": (False,),
    "query_pre_attn_scalar": (7,),
    "rope_interleave": (False, None),
    "rope_local_base_freq": (50.0,),
    "rope_parameters": (None, {"rope_type": "default", "rope_theta": 300.0}, {"rope_type": "proportional"}),
    "rope_scaling": (
        {"rope_type": "linear", "factor": 3.0},
        {"type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "rope_theta": (300.0,),
    "routed_scaling_factor": (3.0, None),
    "scoring_func": ("softmax", "sigmoid"),
    "sliding_window": (5,),
    "sliding_window_pattern": (2, None),
    "swiglu_alpha": (1.0,),
    "swiglu_limit": (0.2,),
    "tie_word_embeddings": (True, False),
    "topk_group": (1, 5),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc", None),
    "use_bidirectional_attention": (True,),
    "use_qk_norm": (True, False),
    "use_sliding_window": (True,),
}
"""What is tried in every family, whether it has the key or not."""
ROPE_SETTINGS = {
    "attention_factor": 2.0, "llama_4_scaling_beta": 0.7, "mscale": 0.5, "mscale_all_dim": 0.5,
    "partial_rotary_factor": 0.5, "truncate": False,
}  # fmt: skip
IDS_BS = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))
POSITIONS_BS = torch.arange(40).expand(2, -1)
Changed = tuple[str, dict[str, Any]]


@pytest.fixture
def alone() -> Iterator[None]:
    with parallel_processes(Layout()):
        yield


def changes(config: Mapping[str, Any]) -> Iterator[Changed]:
    """Configs with one change each, and what it is."""

    def changed(path: tuple[str, ...], *value: Any) -> Changed:
        whole = deepcopy(dict(config))
        place = whole
        for key in path[:-1]:
            place = place[key]
        place.pop(path[-1], None)
        if value:
            place[path[-1]] = value[0]
        return ".".join(path) + (f" = {value[0]!r}" if value else " missing"), whole

    own = [(key,) for key in config if key not in NOT_OF_THE_DECODER and not key.startswith("_")]
    rope = config["rope_parameters"]
    own += [("rope_parameters", key) for key in rope]
    for path in own:
        yield changed(path)
        value = config[path[0]] if len(path) == 1 else rope[path[1]]
        for other in others(value):
            yield changed(path, other)
    for key, values in SETTINGS.items():
        yield from (changed((key,), value) for value in values if key not in config or config[key] != value)
    if not any(isinstance(value, dict) for value in rope.values()):
        yield from (changed(("rope_parameters", key), value) for key, value in ROPE_SETTINGS.items() if key not in rope)


def others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2), None]
    return [value * 1.5 + 0.01, None] if isinstance(value, float) else [None]


def tensors_of_files(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the files of a model must have."""
    dims = dims_of(config)
    steps = steps_of(family_of_config(config), dims)
    return {n: s for step in steps for n, s in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True)}


def logits_of_transformers(model: PreTrainedModel, config: Mapping[str, Any]) -> Tensor | None:
    """None if transformers can't build or run it with these weights."""
    try:
        hf_config = AutoConfig.for_model(**deepcopy(dict(config)))
        hf_config._attn_implementation = "eager"
        other = type(model)(hf_config).eval()
        other.load_state_dict(model.state_dict())
        other.tie_weights()
        return other(IDS_BS).logits
    except Exception:  # whatever it ends with, there is nothing that ours could be equal to
        return None


def logits_of_ours(model: PreTrainedModel, config: Mapping[str, Any]) -> Tensor:
    ours = build_model(
        config, layout=Layout(), backend="torch", params_dtype=torch.float32, padded_vocab_size=PADDED_VOCAB_SIZE
    )
    fill(ours, mcore_tensors(model, config, padded_vocab_size=PADDED_VOCAB_SIZE))
    logits: Tensor = ours.eval()(IDS_BS, POSITIONS_BS, None)[..., : config["vocab_size"]]
    return logits


@torch.no_grad()
def fault(model: PreTrainedModel, config: Mapping[str, Any], of_files: Mapping[str, Any]) -> str:
    """What is wrong with what becomes of a config; nothing if it is refused, or built as transformers does."""
    try:
        if kind_problems(config) or config_findings(config).problems or tensors_of_files(config) != of_files:
            return ""
        ours = logits_of_ours(model, config)
    except InputError:
        return ""
    except Exception as exc:
        return f"ended in {type(exc).__name__}: {exc}"
    expected = logits_of_transformers(model, config)
    if expected is None:
        return "transformers fails, and ours is built"
    error = ((expected - ours).abs().max() / expected.std()).item()
    return "" if error < 1e-4 else f"logits differ by {error:.1e}"


def faults(name: str, num_sampled: int | None) -> list[str]:
    model, config = tiny_hf_model(name)
    config = json.loads(json.dumps(config))  # as a file has it
    of_files = tensors_of_files(config)
    assert fault(model, config, of_files) == "" and logits_of_transformers(model, config) is not None
    tried = list(changes(config))
    assert len(tried) > 90
    if num_sampled is not None:
        tried = random.Random(name).sample(tried, num_sampled)
    found = [(what, fault(model, changed, of_files)) for what, changed in tried]
    return [f"{what}: {wrong}" for what, wrong in found if wrong]


def test_every_family_is_among_them() -> None:
    families = {family_of_config(tiny_hf_model(name)[1]).name for name in ALL}
    assert {family_of_config(tiny_hf_model(name)[1]).name for name in ONE_OF_EACH_FAMILY} == families


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_some_changes_are_refused_or_built_as_transformers_does(name: str) -> None:
    assert faults(name, NUM_SAMPLED) == []


@pytest.mark.layouts
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ALL)
def test_all_changes_are_refused_or_built_as_transformers_does(name: str) -> None:
    assert faults(name, None) == []


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_what_no_family_builds_is_named_in_each(name: str) -> None:
    config = tiny_hf_model(name)[1]
    wrong = {"model_type": "bloom", "is_causal": False, "per_layer_config": {"0": {"rms_norm_eps": 0.5}}}
    with pytest.raises(InputError) as caught:
        family_of_config(config | wrong)
    assert {problem.subject for problem in caught.value.problems} == {f"config.json: {key}" for key in wrong}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (
            "llama",
            {
                "num_key_value_heads": 3,
                "is_causal": None,
                "hidden_act": "gelu",
                "rms_norm_eps": 0,
                "partial_rotary_factor": 0.5,
                "layer_types": ["sliding_attention"] * 4,
                "rope_parameters": {"rope_type": "mrope"},
            },
        ),
        (
            "qwen3_moe",
            {
                "moe_intermediate_size": None,
                "decoder_sparse_step": 0,
                "hidden_act": "gelu",
                "sliding_window": 0,
                "use_sliding_window": True,
                "rope_parameters": {"rope_type": "mrope"},
            },
        ),
        (
            "gemma3",
            {
                "hidden_size": 0,
                "attn_logit_softcapping": 3.0,
                "hidden_activation": "gelu",
                "use_bidirectional_attention": True,
                "layer_types": ["x"] * 4,
                "rope_parameters": {"rope_type": "mrope"},
            },
        ),
        (
            "deepseek_v3",
            {
                "n_shared_experts": 0,
                "attention_bias": True,
                "topk_method": "greedy",
                "first_k_dense_replace": 9,
                "head_dim": 3,
                "layer_types": ["sliding_attention"] * 4,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            },
        ),
    ],
)
def test_a_mistake_of_each_kind_is_named_at_once(name: str, wrong: dict[str, Any]) -> None:
    config = tiny_hf_model(name)[1] | wrong
    text = "\n".join(map(str, config_findings(config).problems))
    named = {"use_sliding_window"}  # it only makes the window count
    assert [key for key in wrong if key not in named and f"config.json: {key}" not in text] == [], text


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_config_without_a_model_type_is_refused_by_that_name(name: str) -> None:
    config = {key: value for key, value in tiny_hf_model(name)[1].items() if key != "model_type"}
    (problem,) = config_findings(config).problems
    assert problem.subject == "config.json: model_type" and family_of_config(config).hf_model_type in problem.expected


def test_a_summary_says_nothing_twice() -> None:
    config = tiny_hf_model("qwen3_moe")[1] | {"num_attention_heads": 7, "hidden_act": "gelu"}
    with pytest.raises(InputError) as caught:
        config_findings(config).raise_all()
    assert caught.value.summary.count("the model's sizes do not fit each other") == 1


def test_a_conversion_says_which_settings_of_training_have_no_effect(tmp_path: Path, capfd: Any) -> None:
    write_hf_folder(tmp_path / "hf", "llama")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.3, "resid_pdrop": 0.0}))
    check(tmp_path / "hf")
    text = capfd.readouterr().err
    assert "attention_dropout 0.3 of config.json has no effect" in text and "resid_pdrop" not in text


def test_a_conversion_names_mistakes_of_all_kinds_at_once(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", "deepseek_v2")
    file = tmp_path / "hf" / "config.json"
    wrong = {"hidden_act": "gelu", "is_causal": False, "num_experts_per_tok": 5, "layer_types": ALTERNATING}
    wrong["rope_parameters"] = {"rope_type": "proportional", "rope_theta": 100.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises(InputError) as caught:
        check(tmp_path / "hf")
    text = "\n".join(map(str, caught.value.problems))
    assert [key for key in wrong if f"config.json: {key}" not in text] == [], text
