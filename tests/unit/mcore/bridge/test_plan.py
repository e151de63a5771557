from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mcore.backend.meta import sharded_shapes
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.plan import mcore_shapes_of, plan_convert, plan_export, steps_of
from mcore.bridge.rules import Copy
from mcore.errors import WeightPlanError
from tests.tiny_models import MODELS, tiny_hf_model


@dataclass(frozen=True)
class Described:
    shape: tuple[int, ...]
    dtype: str = "float32"


def stored(name: str, *shape: int, dtype: str = "float32") -> StoredTensor:
    return StoredTensor(name, dtype, shape, Path("model.safetensors"), 0, 4 * math.prod(shape))


class Side:
    """Everything that a plan of one tiny model compares; a test changes what it likes."""

    def __init__(self, name: str) -> None:
        model, self.config = tiny_hf_model(name)
        self.family = family_of_config(self.config)
        self.dims = dims_of(self.config, make_vocab_size_divisible_by=128)
        # What save_pretrained writes: the state dict without a tied model's second name for one tensor.
        self.hf = {
            key: stored(key, *tensor.shape)
            for key, tensor in model.state_dict().items()
            if not (key == "lm_head.weight" and self.dims.tied)
        }
        content = sharded_shapes(self.config, padded_vocab_size=self.dims.padded_vocab, params_dtype=torch.bfloat16)
        self.mcore = {key: tensor.shape for key, tensor in content.tensors.items()}

    def convert(self):
        return plan_convert(self.family, self.dims, hf=self.hf, mcore_shapes=self.mcore)

    def export(self, extra=None):
        return plan_export(
            self.family, self.dims, mcore={key: Described(shape) for key, shape in self.mcore.items()} | (extra or {})
        )

    def problems(self, make=None):
        with pytest.raises(WeightPlanError) as caught:
            (make or self.convert)()
        return {problem.subject: problem for problem in caught.value.problems}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_accounts_for_transformers_and_megatrons_tensors(name):
    side = Side(name)
    for plan in (side.convert(), side.export()):
        claimed = [name for step in plan.steps for name in step.hf_names]
        assert sorted(claimed) == sorted(side.hf)
        assert {step.mcore_key for step in plan.steps} == side.mcore.keys()


def test_steps_go_through_the_model_layer_by_layer():
    side = Side("qwen2")
    steps = steps_of(side.family, side.dims)
    assert steps[0].hf_names == ("model.embed_tokens.weight",)
    assert [step.index for step in steps[1:-2]] == sorted(step.index for step in steps[1:-2])
    assert [step.hf_names for step in steps[-2:]] == [("model.norm.weight",), ("lm_head.weight",)]


def test_layers_are_stacked():
    side = Side("llama")
    assert mcore_shapes_of(side.family, side.dims) == side.mcore


def test_every_problem_of_a_conversion_is_in_one_error():
    side = Side("llama")
    del side.hf["model.norm.weight"]
    for changed in (
        stored("model.layers.0.self_attn.q_proj.bias", 64),
        stored("model.layers.9.mlp.up_proj.weight", 96, 64),
        stored("model.embed_tokens.weight", 252, 64),
        stored("model.layers.1.self_attn.k_proj.weight", 32, 64, dtype="int8"),
        stored("model.layers.2.input_layernorm.weight", 64, dtype="bfloat16"),
    ):
        side.hf[changed.name] = changed
    del side.mcore["output_layer.weight"]
    side.mcore["decoder.layers.mlp.router.weight"] = (4, 8, 64)
    side.mcore["decoder.final_layernorm.weight"] = (65,)
    problems = side.problems()
    assert problems.keys() == {
        "hf model.norm.weight",
        "hf model.layers.0.self_attn.q_proj.bias",
        "hf model.layers.9.mlp.up_proj.weight",
        "hf model.embed_tokens.weight",
        "hf model.layers.1.self_attn.k_proj.weight",
        "hf tensors of mcore decoder.layers.self_attention.linear_qkv.weight",
        "hf tensors of mcore decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "mcore output_layer.weight",
        "mcore decoder.layers.mlp.router.weight",
        "mcore decoder.final_layernorm.weight",
    }
    assert problems["hf model.embed_tokens.weight"].expected == "[250, 64]"
    assert problems["hf model.embed_tokens.weight"].found == "[252, 64]"
    assert "int8" in problems["hf model.layers.1.self_attn.k_proj.weight"].found


def test_a_tensor_claimed_by_two_rows_is_found():
    side = Side("llama")
    again = Copy("decoder.final_layernorm.weight", "hidden", "model.norm.weight")
    side.family = replace(side.family, rules=(*side.family.rules, again))
    problems = side.problems()
    assert problems.keys() == {"hf model.norm.weight", "mcore decoder.final_layernorm.weight"}
    assert problems["hf model.norm.weight"].found == "2 rows that claim it"


def test_old_rotary_buffers_are_left_out_by_name():
    side = Side("llama")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(side.dims.num_layers)}
    side.hf |= {name: stored(name, 4) for name in old}
    assert set(side.convert().ignored_hf) == old
    side.hf["model.layers.99.self_attn.rotary_emb.inv_freq"] = stored(
        "model.layers.99.self_attn.rotary_emb.inv_freq", 4
    )
    assert side.problems().keys() == {"hf model.layers.99.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_old_buffers_are_left_out_in_every_family(name):
    side = Side(name)
    old = {
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.3.self_attn.masked_bias",
    }
    side.hf |= {name: stored(name, 4) for name in old}
    assert set(side.convert().ignored_hf) == old
    side.hf["model.layers.0.self_attn.unmasked_bias"] = stored("model.layers.0.self_attn.unmasked_bias", 4)
    assert side.problems().keys() == {"hf model.layers.0.self_attn.unmasked_bias"}


def test_a_tied_models_stored_head_must_equal_its_embedding():
    side = Side("qwen3_tied")
    assert side.convert().equal_hf == ()
    side.hf["lm_head.weight"] = side.hf["model.embed_tokens.weight"]
    plan = side.convert()
    assert plan.equal_hf == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert "lm_head.weight" not in {name for step in plan.steps for name in step.hf_names}


def test_an_untied_model_without_a_head_is_not_whole():
    side = Side("qwen3")
    del side.hf["lm_head.weight"]
    assert side.problems().keys() == {"hf lm_head.weight"}


def test_training_state_is_left_out_of_an_export_and_nothing_else():
    side = Side("llama")
    state = {
        "optimizer.state.exp_avg.output_layer.weight": Described((256, 64)),
        "chained_0.optimizer.state.param.output_layer.weight": Described((256, 64)),
        "rng_state": Described((2,), "uint8"),
    }
    assert len(side.export(state).steps) == len(side.convert().steps)
    found = side.problems(lambda: side.export(state | {"decoder.layers.mlp.adapter.weight": Described((4, 8, 64))}))
    assert found.keys() == {"mcore decoder.layers.mlp.adapter.weight"}


def test_every_problem_of_an_export_is_in_one_error():
    side = Side("llama")
    side.dims = replace(side.dims, padded_vocab=200)
    del side.mcore["decoder.final_layernorm.weight"]
    problems = side.problems(side.export)
    assert problems.keys() == {
        "mcore decoder.final_layernorm.weight",
        "mcore embedding.word_embeddings.weight",
        "mcore output_layer.weight",
        "mcore vocabulary",
    }
