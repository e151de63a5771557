"""Transformer Engine's layers with every norm as a layer of its own, where adapters need what a norm puts out.

megatron-core lets Transformer Engine normalise inside of the linear layer that a norm goes into. An adapter on such a
layer needs the normalised input too. The pieces are the same kernels, and a checkpoint names them as before: the norms'
keys are those of the joint layers, as backend `torch` has them too.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec

from mcore.backend.mla import CHECKPOINT_KEYS

MLP_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def with_norms_apart(dense_layer: ModuleSpec, engine: BackendSpecProvider) -> ModuleSpec:
    """The spec of a dense layer of Transformer Engine's, whose linear layers get normalised inputs.

    Args:
        dense_layer: From `get_gpt_layer_with_transformer_engine_spec`; stays as it is.
        engine: Says which modules there are.
    """
    joint, column, norm = (
        engine.column_parallel_layer_norm_linear(),
        engine.column_parallel_linear(),
        engine.layer_norm(),
    )
    layer = dense_layer.submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    of_attention, keys = {}, dict(MLP_KEYS)
    if hasattr(attention, "linear_qkv"):
        of_attention["linear_qkv"] = column
        keys |= ATTENTION_KEYS
    else:  # latents, whose layers in front of them have a norm of their own anyhow
        for linear, latent_norm in (("linear_q_up_proj", "q_layernorm"), ("linear_kv_up_proj", "kv_layernorm")):
            if getattr(attention, linear) is joint:
                of_attention |= {linear: column, latent_norm: norm}
        keys |= CHECKPOINT_KEYS
    return replace(
        dense_layer,
        submodules=replace(
            layer,
            input_layernorm=norm,
            pre_mlp_layernorm=norm,
            self_attention=replace(layer.self_attention, submodules=replace(attention, **of_attention)),
            mlp=replace(layer.mlp, submodules=replace(mlp, linear_fc1=column)),
            sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map | keys,
        ),
    )
