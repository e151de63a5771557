from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore.backend.rope import ReferenceRope
from mcore.backend.rope_scaling import NEEDED, rope_parameters
from mcore.errors import ConfigError
from tests.tiny_dense import DENSE, YARN_ROPE, longrope
from tests.tiny_models import LINEAR_ROPE, LLAMA3_ROPE, MODELS, SIZES, tiny_hf_model

OLD_STYLE = {
    "default": ({}, {"rope_type": "default"}),
    "linear": ({"type": "linear", "factor": 4.0}, LINEAR_ROPE),
    "llama3": ({key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}, LLAMA3_ROPE),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, YARN_ROPE),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3: dict[str, Any] = {
    **SIZES,
    "head_dim": 8,
    "layer_types": [LOCAL, GLOBAL] * 2,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 500.0},
        GLOBAL: {"rope_type": "linear", "rope_theta": 20000.0, "factor": 8.0},
    },
}


def only_table(config: dict[str, Any], seq_len: int = 1) -> Any:
    return ReferenceRope(config).tables(seq_len)[0]


@pytest.mark.parametrize("seq_len", [8, 16, 17, 40, 200])
@pytest.mark.parametrize("name", [*MODELS, *DENSE])
def test_tables_are_what_a_forward_of_the_reference_model_uses(name: str, seq_len: int) -> None:
    model, config = tiny_hf_model(name)
    with torch.no_grad():
        model(torch.zeros(1, seq_len, dtype=torch.long) + 1)
    table = only_table(config, seq_len)
    assert torch.equal(table.inverse_frequencies, model.model.rotary_emb.inv_freq)
    assert table.attention_factor == model.model.rotary_emb.attention_scaling


def test_lengths_and_kinds_of_these_models_differ() -> None:
    """Else the test above would not see one taken for another."""
    of = {name: tiny_hf_model(name)[1] for name in [*MODELS, *DENSE]}
    for name in ("llama_dynamic", "phi3_long", "phi4_partial"):
        rope = ReferenceRope(of[name])
        assert rope.depends_on_length
        short, long = (rope.tables(seq_len)[0].inverse_frequencies for seq_len in (16, 17))
        assert not torch.equal(short, long), name
    assert not ReferenceRope(of["llama_yarn"]).depends_on_length
    factors = {name: only_table(of[name]).attention_factor for name in ("llama_yarn", "qwen2_yarn", "phi3_long")}
    assert len({1.0, *factors.values()}) == 4
    assert only_table(of["mistral_yarn"]).attention_factor == 1.3
    assert len(only_table(of["phi4_partial"]).inverse_frequencies) == 6
    kinds = [only_table(of[name]).inverse_frequencies for name in ("llama", "llama3", "llama_linear")]
    assert (kinds[0][:2] == kinds[1][:2]).any() and (kinds[0][-2:] != kinds[1][-2:]).all()
    assert (kinds[0] != kinds[2]).all()


def test_a_long_sequence_leaves_nothing_behind_for_a_shorter_one() -> None:
    """transformers' own module goes on with the frequencies of the longest sequence it has seen."""
    rope = ReferenceRope(tiny_hf_model("llama_dynamic")[1])
    fresh = rope.tables(20)[0].inverse_frequencies
    rope.tables(100)
    assert torch.equal(rope.tables(20)[0].inverse_frequencies, fresh)


def test_each_layer_type_has_its_own_table() -> None:
    config = Gemma3TextConfig(**GEMMA3)
    reference = Gemma3RotaryEmbedding(config)
    rope = ReferenceRope(config.to_dict())
    assert set(rope.layer_types) == {LOCAL, GLOBAL}
    for name, table in zip(rope.layer_types, rope.tables(40), strict=True):
        assert torch.equal(table.inverse_frequencies, getattr(reference, f"{name}_inv_freq"))
    assert not torch.equal(*(table.inverse_frequencies for table in rope.tables(40)))


def test_a_layer_type_that_no_layer_has_is_left_out() -> None:
    config = Gemma3TextConfig(**{**GEMMA3, "layer_types": [GLOBAL] * 4}).to_dict()
    assert set(config["rope_parameters"]) == {LOCAL, GLOBAL}
    assert ReferenceRope(config).layer_types == (GLOBAL,)


@pytest.mark.parametrize("kind", OLD_STYLE)
def test_configs_of_older_transformers_mean_the_same(kind: str) -> None:
    scaling, rope = OLD_STYLE[kind]
    theta = rope.get("rope_theta", 20000.0)
    rope = {key: value for key, value in rope.items() if not key.startswith("beta")}
    old = {"model_type": "llama", **SIZES, "rope_theta": theta, "rope_scaling": scaling or None}
    new = {"model_type": "llama", **SIZES, "rope_parameters": {**rope, "rope_theta": theta}}
    assert torch.equal(only_table(old).inverse_frequencies, only_table(new).inverse_frequencies)


@pytest.mark.parametrize("old_name", ["su", "yarn", "longrope"])
def test_phi3s_old_names_of_longrope_are_known(old_name: str) -> None:
    _, new = tiny_hf_model("phi3_long")
    rope = longrope(8, 16)
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": old_name, **{key: rope[key] for key in ("short_factor", "long_factor")}},
    }
    if old_name == "su":  # transformers 5.19 doesn't look beside the rope for it under this name
        old["rope_scaling"]["original_max_position_embeddings"] = 16
    assert rope_parameters(old)[""]["rope_type"] == "longrope"
    for seq_len in (16, 17):
        assert torch.equal(only_table(old, seq_len).inverse_frequencies, only_table(new, seq_len).inverse_frequencies)
    assert only_table(old).attention_factor == only_table(new).attention_factor


def test_phi_4_minis_partial_factor_beside_the_rope_is_heeded() -> None:
    _, new = tiny_hf_model("phi4_partial")
    rope = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"partial_rotary_factor": rope.pop("partial_rotary_factor"), "rope_theta": rope.pop("rope_theta")}
    old |= {"rope_scaling": rope}
    assert torch.equal(only_table(old, 40).inverse_frequencies, only_table(new, 40).inverse_frequencies)


def test_the_old_field_wins_as_it_does_in_transformers() -> None:
    both = {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3_ROPE, "rope_scaling": LINEAR_ROPE}
    linear = {"model_type": "llama", **SIZES, "rope_parameters": LINEAR_ROPE}
    assert rope_parameters(both)[""]["rope_type"] == "linear"
    assert torch.equal(only_table(both).inverse_frequencies, only_table(linear).inverse_frequencies)


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 1, 1]}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "4"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_parameters.long_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1}}, "high_freq_factor"),
        (
            {"rope_parameters": {GLOBAL: {"rope_type": "axial"}, LOCAL: {"rope_type": "default"}}},
            f"rope_parameters.{GLOBAL}.rope_type",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling"),
    ],
)
def test_what_can_not_be_built_is_refused_by_field(settings: dict, subject: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rope_parameters({"model_type": "llama", **SIZES, **settings})
    assert [problem.subject for problem in caught.value.problems if problem.subject.endswith(subject)]
    assert len(caught.value.problems) == 1


def test_every_rope_type_of_transformers_is_known() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(NEEDED) == {"default", *ROPE_INIT_FUNCTIONS}


def test_factors_of_the_wrong_number_are_an_input_error() -> None:
    rope = longrope(5, 16)  # the head has 4 frequencies
    with pytest.raises(ConfigError, match="what transformers takes"):
        ReferenceRope({"model_type": "llama", **SIZES, "rope_parameters": rope})


def test_a_config_that_transformers_refuses_is_an_input_error() -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        ReferenceRope({"model_type": "qwen2", **SIZES, "layer_types": ["full_attention"]})


def test_the_config_is_left_as_it_was() -> None:
    config = {"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_parameters": {"type": "linear", "factor": 2.0}}
    ReferenceRope(config)
    assert config["rope_parameters"] == {"type": "linear", "factor": 2.0}


def test_frequencies_stay_fp32_whatever_the_default_dtype_is() -> None:
    config = tiny_hf_model("llama")[1]
    expected = LlamaRotaryEmbedding(tiny_hf_model("llama")[0].config).inv_freq
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(only_table(config).inverse_frequencies, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ropes_of_layer_types_may_stand_in_the_fields_of_old_files() -> None:
    config = tiny_hf_model("gemma3")[1]
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")} | {
        "sliding_window_pattern": 3,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    new_rope, old_rope = ReferenceRope(config), ReferenceRope(old)
    assert old_rope.layer_types == new_rope.layer_types == ("sliding_attention", "full_attention")
    for ours, theirs in zip(old_rope.tables(4), new_rope.tables(4), strict=True):
        assert torch.equal(ours.inverse_frequencies, theirs.inverse_frequencies)
    assert not torch.equal(old_rope.tables(4)[0].inverse_frequencies, old_rope.tables(4)[1].inverse_frequencies)


def test_a_rope_that_no_layer_uses_is_left_out() -> None:
    config = tiny_hf_model("gemma3")[1] | {"layer_types": ["full_attention"] * 4}
    assert ReferenceRope(config).layer_types == ("full_attention",)
