"""Transformer Engine's layers with their norms apart: the same layer as backend `torch` has, under the same keys.

Which modules there are is asked of a provider; what they compute is in `tests/gpu/test_lora_gpu.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from mcore.backend.engine_norms import with_norms_apart
from mcore.backend.layout import Layout
from mcore.backend.model import transformer_config
from mcore.backend.norms import RMSNorm
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import decoder_layer
from mcore.bridge.families import family_of_config
from tests.tiny_models import PADDED_VOCAB_SIZE, tiny_hf_model


class Joint(torch.nn.Module):
    """Stands where a spec names the layer that normalises its input."""


class Provider(LocalSpecProvider):  # type: ignore[misc]
    """megatron-core's own modules, and a joint layer's name."""

    def column_parallel_layer_norm_linear(self) -> Any:
        return Joint

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> Any:
        return RMSNorm


def layers(name: str) -> tuple[ModuleSpec, ModuleSpec]:
    """A layer of backend `torch`, and the same as Transformer Engine has it, with norms inside."""
    hf_config = tiny_hf_model(name)[1]
    with parallel_processes(Layout()):
        config = transformer_config(
            hf_config,
            padded_vocab_size=PADDED_VOCAB_SIZE,
            layout=Layout(),
            params_dtype=torch.float32,
            backend="torch",
        )
    apart = decoder_layer(config, family_of_config(hf_config).features(hf_config))
    of_layer = apart.submodules
    attention, changes = of_layer.self_attention.submodules, {}
    if hasattr(attention, "linear_qkv"):
        changes = {"linear_qkv": Joint}
    else:
        changes = {"linear_kv_up_proj": Joint, "kv_layernorm": IdentityOp}
    joint = replace(
        apart,
        submodules=replace(
            of_layer,
            input_layernorm=IdentityOp if "linear_qkv" in changes else RMSNorm,
            pre_mlp_layernorm=IdentityOp,
            self_attention=replace(of_layer.self_attention, submodules=replace(attention, **changes)),
            mlp=replace(of_layer.mlp, submodules=replace(of_layer.mlp.submodules, linear_fc1=Joint)),
            sharded_state_dict_keys_map={"mlp.0.weight": "mlp.linear_fc1.layer_norm_weight"},
        ),
    )
    return apart, joint


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3"])
def test_norms_stand_in_front_of_plain_layers_under_the_keys_of_joint_ones(name: str) -> None:
    expected, joint = layers(name)
    before = repr(joint)
    found = with_norms_apart(joint, Provider()).submodules
    assert repr(joint) == before
    assert "Joint" not in repr(found)
    assert found.input_layernorm is found.pre_mlp_layernorm is RMSNorm
    assert found.mlp.submodules.linear_fc1 is ColumnParallelLinear
    attention = found.self_attention.submodules
    if name == "deepseek_v3":
        assert attention.linear_kv_up_proj is ColumnParallelLinear and attention.kv_layernorm is RMSNorm
        assert attention.q_layernorm is joint.submodules.self_attention.submodules.q_layernorm  # was apart already
    else:
        assert attention.linear_qkv is ColumnParallelLinear
    keys = found.sharded_state_dict_keys_map
    assert keys.items() >= expected.submodules.sharded_state_dict_keys_map.items()
    assert keys.keys() - expected.submodules.sharded_state_dict_keys_map == {"mlp.0.weight"}
