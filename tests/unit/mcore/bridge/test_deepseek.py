"""DeepSeek-V2 and V3, GLM-4.5: round trips bit for bit, with and without layers for further tokens; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from mcore.bridge.convert import convert
from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.export import export
from mcore.bridge.families import deepseek_v3, dims_of, family_of_config
from mcore.bridge.rules import Rule
from mcore.errors import ConfigError, WeightPlanError
from mcore.verify.verify import verify
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.tiny_latent import LATENT_MODELS
from tests.tiny_models import PADDED_VOCAB_SIZE, tiny_hf_model
from tests.tiny_mtp import MTP_MODELS, NUM_MTP_LAYERS, own_tensors, tiny_mtp_model, write_mtp_folder


def round_trip(folder: Path) -> Path:
    convert(folder / "hf", folder / "mcore", make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    export(folder / "mcore", folder / "back")
    return folder / "back"


def without_tokenizer(folder: Path) -> None:
    """Take away the tokenizer that does not load, so that prompts are made of bare ids."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_export_gives_back_every_bit(tmp_path: Path, name: str) -> None:
    write_hf_folder(tmp_path / "hf", name, dtype=torch.bfloat16)
    back = round_trip(tmp_path)
    assert_same_weights(weights_of(tmp_path / "hf"), weights_of(back))


@pytest.mark.parametrize("name", MTP_MODELS)
def test_layers_for_further_tokens_and_their_copies_come_back(tmp_path: Path, name: str) -> None:
    write_mtp_folder(tmp_path / "hf", name, dtype=torch.bfloat16)
    back = round_trip(tmp_path)
    assert_same_weights(weights_of(tmp_path / "hf"), weights_of(back))
    saved = read_dist_tensors(tmp_path / "mcore" / "release")
    assert saved["mtp.layers.1.transformer_layer.mlp.router.expert_bias"].dtype == "float32"
    assert saved["mtp.layers.1.eh_proj.weight"].dtype == "bfloat16"


@pytest.mark.parametrize("name", MTP_MODELS)
def test_transformers_reads_exported_layers_for_further_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_mtp_folder(tmp_path / "hf", name)
    back = round_trip(tmp_path)
    main = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    # Its own patterns name the layers that the published models have.
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[45].*"])
    found = dict(own_tensors(MtpModel.from_pretrained(main)))
    expected = dict(own_tensors(tiny_mtp_model(name)[1]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_checkpoint_with_layers_for_further_tokens_is_proven(tmp_path: Path) -> None:
    write_mtp_folder(tmp_path / "hf", "deepseek_v3", dtype=torch.bfloat16)
    round_trip(tmp_path)
    for hf in ("hf", "back"):
        without_tokenizer(tmp_path / hf)
        report = verify(tmp_path / hf, tmp_path / "mcore", tmp_path / f"proof-{hf}")
        assert report.passed and report.noise is not None


@pytest.mark.parametrize("wrong", [("enorm", "hnorm"), ("hnorm", "shared_head.norm")])
def test_a_wrong_table_of_the_layers_for_further_tokens_is_seen_in_their_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, str]
) -> None:
    """As bits it is right: the table is its own inverse."""
    exchanged = dict((wrong, wrong[::-1]))

    def other(rule: Rule) -> Rule:
        name = rule.hf.removeprefix("model.layers.{L}.").removesuffix(".weight")
        return replace(rule, hf=rule.hf.replace(name, exchanged[name])) if name in exchanged else rule

    family = replace(deepseek_v3.FAMILY, rules=tuple(map(other, deepseek_v3.FAMILY.rules)))
    monkeypatch.setattr(deepseek_v3, "FAMILY", family)
    write_mtp_folder(tmp_path / "hf", "deepseek_v3")
    round_trip(tmp_path)
    without_tokenizer(tmp_path / "hf")
    report = verify(tmp_path / "hf", tmp_path / "mcore", tmp_path / "proof")
    assert report.structural.passed
    assert report.numerical is not None and report.numerical.relative_error > 1e-2


def test_a_copy_that_is_none_is_refused(tmp_path: Path) -> None:
    write_mtp_folder(tmp_path / "hf", "glm4_moe")
    weights = weights_of(tmp_path / "hf")
    weights["model.layers.5.shared_head.head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(WeightPlanError, match=r"5\.shared_head\.head\.weight: expected the same bytes as lm_head"):
        round_trip(tmp_path)


def test_a_model_without_the_layers_that_its_config_speaks_of_is_one_without_them(tmp_path: Path) -> None:
    """As transformers saves a model that was published with them."""
    write_hf_folder(tmp_path / "hf", "deepseek_v3")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    back = round_trip(tmp_path)
    assert_same_weights(weights_of(tmp_path / "hf"), weights_of(back))
    assert json.loads((back / "config.json").read_text())["num_nextn_predict_layers"] == 0
    without_tokenizer(tmp_path / "hf")
    assert verify(tmp_path / "hf", tmp_path / "mcore", tmp_path / "proof").passed


def test_half_of_the_layers_for_further_tokens_is_refused(tmp_path: Path) -> None:
    write_mtp_folder(tmp_path / "hf", "deepseek_v3")
    weights = weights_of(tmp_path / "hf")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.5.")}
    save_file(kept, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(WeightPlanError, match=r"model\.layers\.5\.eh_proj\.weight"):
        round_trip(tmp_path)
    assert NUM_MTP_LAYERS == 2


def refused(name: str, change: dict[str, Any]) -> set[str]:
    config = tiny_hf_model(name)[1] | change
    with pytest.raises(ConfigError) as caught:
        dims_of(config)
        family_of_config(config).transformer_config(config)
        family_of_config(config).features(config)
    return {problem.subject.removeprefix("config.json: ") for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek_v3", {"rope_interleave": False, "attention_bias": True, "moe_layer_freq": 2}),
        ("deepseek_v3", {"scoring_func": "softmax", "topk_method": "greedy"}),
        ("deepseek_v3", {"kv_lora_rank": None, "v_head_dim": 0, "n_shared_experts": None}),
        ("deepseek_v3", {"num_key_value_heads": 4}),
        ("deepseek_v3", {"first_k_dense_replace": 4}),
        ("deepseek_v3", {"topk_group": None}),
        ("deepseek_v3", {"num_experts_per_tok": 1}),
        ("deepseek_v2", {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("glm4_moe", {"n_routed_experts": "many", "moe_intermediate_size": None}),
    ],
)
def test_what_can_not_be_built_is_named(name: str, change: dict[str, Any]) -> None:
    assert refused(name, change) == set(change)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_groups_of_a_single_expert_are_refused(name: str) -> None:
    """They have no best two experts to be ranked by; transformers fails on them too."""
    assert refused(name, {"n_group": 8, "topk_group": 8}) == {"n_group"}


def test_shared_embeddings_with_layers_for_further_tokens_are_refused() -> None:
    change = {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}
    assert refused("deepseek_v3", change) == {"tie_word_embeddings"}


def test_fields_that_are_null_or_absent_are_those_of_the_published_models() -> None:
    """Moonlight's config has no groups to speak of and no scaling; original files name the router's kind."""
    config = tiny_hf_model("moonlight")[1]
    published = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_interleave")}
    published |= {"rope_scaling": None, "rope_theta": 50000.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    published |= {"moe_layer_freq": 1, "ep_size": 1, "num_nextn_predict_layers": 0}
    family = family_of_config(published)
    expected = family.transformer_config(config)
    assert family.transformer_config(published) == expected
    assert (expected["rotary_scaling_factor"], expected["mscale_all_dim"], expected["q_lora_rank"]) == (1.0, 0.0, None)
