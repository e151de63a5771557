"""Layer specs: which modules megatron-core builds its decoder from.

`torch` runs anywhere (SDPA, our norms). `transformer_engine` needs CUDA and the package. Both give the same names and
shapes in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mcore.backend.attention import SDPAttention
from mcore.backend.engine_norms import with_norms_apart
from mcore.backend.linear import InputLinear, OutputLinear
from mcore.backend.mla import CHECKPOINT_KEYS, latent_attention
from mcore.backend.moe import moe_layer_spec
from mcore.backend.norms import ProjectionRMSNorm, RMSNorm
from mcore.backend.routing import choose_router
from mcore.bridge.dims import ModelDims
from mcore.bridge.features import Features
from mcore.errors import ConfigError, Problem

Backend = Literal["torch", "transformer_engine"]


def resolve_backend(
    backend: Literal["auto", "torch", "transformer_engine"], features: Features | None = None
) -> Backend:
    """The backend that `auto` stands for on this machine; a named one is checked and given back.

    Args:
        backend: As a run names it.
        features: Of the model: `auto` is torch for one that Transformer Engine's layers can't be built for. None asks
            about the machine alone.

    Raises:
        ConfigError: Transformer Engine is asked for, and this machine can't run it.
    """
    problems = []
    if not torch.cuda.is_available():
        problems.append(Problem("CUDA", "a device", "none"))
    if importlib.util.find_spec("transformer_engine") is None:
        problems.append(Problem("transformer_engine", "an installed package", "none"))
    if backend == "auto":
        return "torch" if problems or (features is not None and engine_lacks(features)) else "transformer_engine"
    if backend == "transformer_engine" and problems:
        raise ConfigError("backend: transformer_engine can't run here", [*problems, Problem("Set backend: torch.")])
    return backend


def layer_spec(
    config: TransformerConfig,
    features: Features,
    dims: ModelDims,
    backend: Backend,
    *,
    norms_apart: bool = False,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """What `GPTModel` builds the decoder layers of this pipeline stage from.

    Args:
        config: Of the whole model.
        features: What the config has no field for.
        dims: Say which layers have experts.
        backend: Which layers.
        norms_apart: Whether no norm is part of a linear layer, as adapters want it; of backend `torch` none ever is.
        vp_stage: Which of this process's parts of the layers, with virtual pipeline stages.

    Raises:
        ConfigError: The backend lacks something that the model has.
    """
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        refuse_what_engine_lacks(features)
        dense = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention
        )
        if norms_apart:
            dense = with_norms_apart(dense, TESpecProvider())
        final_norm: Any = TESpecProvider().layer_norm()
    else:
        dense, final_norm = decoder_layer(config, features), norm(features)
    assert features.norm_placement == "before" or not any(dims.moe_layers), "no norm is built behind experts"
    with_experts = moe_layer_spec(dense, config, backend) if any(dims.moe_layers) else dense
    choose_router(with_experts, features)
    first = get_transformer_layer_offset(config, vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage))
    layers = [with_experts if dims.is_moe(number) else dense for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def decoder_layer(config: TransformerConfig, features: Features) -> ModuleSpec:
    """Spec of one decoder layer without experts, of backend `torch`.

    Checkpoints name norms as Transformer Engine does, which has them in the linear layer that they go into.
    """
    input_norm = IdentityOp if features.norm_placement == "behind" else norm(features)
    keys = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        attention = latent_attention(
            norm=norm(features), core_attention=core_attention(features), output_linear=output_linear(features)
        )
        keys |= CHECKPOINT_KEYS
    else:
        attention = self_attention(config, features)
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=input_norm,
            mlp=dense_mlp(features),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def self_attention(config: TransformerConfig, features: Features) -> ModuleSpec:
    """Attention whose query, key and value are one projection of the hidden states."""
    query_norm = key_norm = norm(features) if config.qk_layernorm else IdentityOp
    if features.qk_norm_over == "projection":
        query_norm = _projection_norm(features, config.num_attention_heads)
        key_norm = _projection_norm(features, config.num_query_groups)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ModuleSpec(module=InputLinear, params={"has_bias": features.attention_input_bias}),
            core_attention=core_attention(features),
            linear_proj=output_linear(features, has_bias=features.attention_output_bias),
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def dense_mlp(features: Features) -> ModuleSpec:
    """The MLP of a layer without experts."""
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=output_linear(features))
    return ModuleSpec(module=MLP, submodules=submodules)


def norm(features: Features) -> ModuleSpec:
    """Every norm of the model but those over a whole projection."""
    return ModuleSpec(module=RMSNorm, params={"scale_in_fp32": features.norms_scale_in_fp32})


def core_attention(features: Features) -> partial[SDPAttention]:
    """Attention of given queries, keys and values."""
    return partial(SDPAttention, windows=features.windows, softcap=features.attention_softcap)


def output_linear(features: Features, *, has_bias: bool | None = None) -> ModuleSpec:
    """The last linear layer of attention or of a dense MLP."""
    post_layernorm = None if features.norm_placement == "before" else norm(features)
    return ModuleSpec(module=OutputLinear, params={"has_bias": has_bias, "post_layernorm": post_layernorm})


def _projection_norm(features: Features, num_heads: int) -> ModuleSpec:
    params = {"num_heads": num_heads, "scale_in_fp32": features.norms_scale_in_fp32}
    return ModuleSpec(module=ProjectionRMSNorm, params=params)


ON_TOP_OF_ANY_LAYER = (
    "logit_softcap",
    "embedding_scale",
    "rope_of_layer",
    "query_scale",
    "num_labels",
    "norms_scale_in_fp32",
    "expert_groups_by",
    "expert_weights_sum_to_one",
)
"""Features that are no part of a layer, or of a router, which both backends share; and how norms round, which
Transformer Engine does in its own way anyhow."""


def engine_lacks(features: Features) -> list[str]:
    """Names of the features that keep a model from being built of Transformer Engine's layers."""
    return [
        field.name
        for field in dataclasses.fields(features)
        if field.name not in ON_TOP_OF_ANY_LAYER and getattr(features, field.name) != field.default
    ]


def refuse_what_engine_lacks(features: Features) -> None:
    """Nothing that a layer has is built with Transformer Engine but what megatron-core's config can say.

    Raises:
        ConfigError: The model has such a feature. Names all of them.
    """
    problems = [
        Problem(f"feature {name}", "none with transformer_engine", repr(getattr(features, name)))
        for name in engine_lacks(features)
    ]
    if problems:
        raise ConfigError(
            "backend transformer_engine can't build this model", [*problems, Problem("Set backend: torch.")]
        )
