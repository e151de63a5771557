"""megatron-core's GPTModel for a Hugging Face config: one function for training, proofs and conversion plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers as layers_of_megatron
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from mcore.backend.heads import install_classification_head
from mcore.backend.layout import Layout
from mcore.backend.mla import FIRST_ROTARY_LENGTH, finish_latent_attention
from mcore.backend.moe import moe_arguments, quick_gelu
from mcore.backend.mtp import GPTModelWithMtp, mtp_block_spec
from mcore.backend.query_scale import install_query_scale
from mcore.backend.rope import ReferenceRope
from mcore.backend.rotary import install_rotary
from mcore.backend.specs import Backend, layer_spec, norm
from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import ConfigError

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}
"""Activation functions by the name that families give."""


def build_model(
    hf_config: Mapping[str, Any],
    *,
    padded_vocab_size: int,
    layout: Layout,
    params_dtype: torch.dtype,
    backend: Backend,
    recompute_granularity: Literal["none", "selective", "full"] = "none",
    recompute_method: Literal["uniform", "block"] | None = None,
    recompute_num_layers: int | None = None,
    gradient_accumulation_fusion: bool = False,
    norms_apart: bool = False,
    training: Mapping[str, Any] | None = None,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's part of the model, on this rank's device, with NaN in every weight until weights are loaded.

    Logits of padding rows are a large negative number, so that a softmax gives them nothing: neither losses nor
    samples ever see the padding, and its rows get no gradient.

    Args:
        hf_config: Mapping of the model's `config.json`.
        padded_vocab_size: Rows of the embedding in megatron-core.
        layout: How the model is divided; `mcore.backend.parallel.start` must have been called with the same one.
        params_dtype: Dtype of parameters and activations.
        backend: Which layers to build (`mcore.backend.specs.resolve_backend`).
        recompute_granularity: Which activations are computed again in the backward pass.
        recompute_method: With `full`: `uniform` or `block`.
        recompute_num_layers: Layers, with `full`.
        gradient_accumulation_fusion: Whether weight gradients are added to `main_grad`, which a data parallel wrapper
            gives the weights, inside the matrix product; for backend `transformer_engine`.
        norms_apart: Whether no norm is part of a linear layer (`mcore.backend.engine_norms`).
        training: Further fields of megatron-core's config, which say how the model learns.
        vp_stage: Which of this process's parts of the model, with virtual pipeline stages; each is a model of its own.

    Raises:
        ConfigError: The model or its layout can't be built; names every reason.
    """
    config = transformer_config(
        hf_config,
        padded_vocab_size=padded_vocab_size,
        layout=layout,
        params_dtype=params_dtype,
        backend=backend,
        recompute_granularity=None if recompute_granularity == "none" else recompute_granularity,
        recompute_method=recompute_method,
        recompute_num_layers=recompute_num_layers,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        **(training or {}),
    )
    rope = ReferenceRope(hf_config)
    dims = dims_of(hf_config)
    features = family_of_config(hf_config).features(hf_config)
    layers = layer_spec(config, features, dims, backend, norms_apart=norms_apart, vp_stage=vp_stage)
    with _output_layer_without_fusion():
        model = (GPTModelWithMtp if dims.num_mtp_layers else GPTModel)(
            config,
            layers,
            mtp_block_spec=mtp_block_spec(config, layers, backend, norm=norm(features), vp_stage=vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=hf_config.get("max_position_embeddings", 0),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=dims.tied,
            position_embedding_type="rope",
            parallel_output=True,
            vp_stage=vp_stage,
        )
    if model.post_process:
        model.output_layer.gradient_accumulation_fusion = False
    model.to(torch.cuda.current_device())  # megatron-core leaves routers on the CPU until they first run
    if config.multi_latent_attention:
        finish_latent_attention(model, rope)
    else:
        install_rotary(model, rope, features.rope_of_layer)
    if features.query_scale is not None:
        install_query_scale(model, features.query_scale)
    if features.num_labels is not None and model.post_process:
        install_classification_head(model, features.num_labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        for name, buffer in model.named_buffers():
            if name.endswith("router.expert_bias"):
                buffer.fill_(torch.nan)
    mark_divided_weights(model)
    if layout.divides_experts_differently:
        mark_experts(model)
    if features.embedding_scale is not None and hasattr(model, "embedding"):
        scale_embedding(model, features.embedding_scale)
    if model.post_process:
        if features.logit_softcap is not None:
            cap_logits(model, features.logit_softcap)
        if features.num_labels is None:
            mask_vocabulary_padding(model, dims.vocab)
    return model


def transformer_config(
    hf_config: Mapping[str, Any],
    *,
    padded_vocab_size: int,
    layout: Layout,
    params_dtype: torch.dtype,
    backend: Backend,
    **options: Any,
) -> TransformerConfig:
    """megatron-core's config of the model. `options` are further fields of it, and count more than the family's.

    Raises:
        ConfigError: The architecture is unknown, has features that can't be built, or can't be divided this way.
    """
    family = family_of_config(hf_config)
    arguments = dict(family.transformer_config(hf_config))
    problems = layout.problems(hf_config, padded_vocab_size=padded_vocab_size)
    if problems:
        raise ConfigError("the model can't be divided this way", problems)
    arguments["activation_func"] = ACTIVATIONS[arguments["activation_func"]]
    if "num_moe_experts" in arguments:
        arguments = moe_arguments(backend) | arguments
    if arguments.get("multi_latent_attention"):
        # megatron-core computes a first table of this length, which context parallel ranks must be able to share.
        arguments["original_max_position_embeddings"] = FIRST_ROTARY_LENGTH * layout.context_parallel_size
    engine = backend == "transformer_engine"
    return (MLATransformerConfig if arguments.get("multi_latent_attention") else TransformerConfig)(
        **{name: value for name, value in arguments.items() if name not in options},
        softmax_type="learnable" if family.features(hf_config).has_sinks else "vanilla",
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=layout.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=layout.decoder_last_pipeline_num_layers,
        # With virtual stages two processes send each other activations and gradients at once. In one batch they are
        # taken for each other where there are but two (seen in 0.16.1).
        overlap_p2p_comm=layout.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=layout.virtual_pipeline_model_parallel_size is None,
        context_parallel_size=layout.context_parallel_size,
        # How Transformer Engine's attention passes keys and values on: the one way that takes packed samples, and any
        # number of heads.
        cp_comm_type="p2p" if layout.context_parallel_size > 1 else None,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        # Weights always come from a checkpoint; `build_model` fills them with NaN, so a forgotten one shows.
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        # Each fusion needs CUDA, and Transformer Engine or Apex.
        bias_activation_fusion=engine and arguments["activation_func"] is torch.nn.functional.silu,
        bias_dropout_fusion=engine,
        apply_rope_fusion=engine,
        cross_entropy_loss_fusion=engine and params_dtype != torch.float16,
        cross_entropy_fusion_impl="te" if engine else "native",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **options,
    )


@contextmanager
def _output_layer_without_fusion() -> Iterator[None]:
    """megatron-core's own linear layers refuse `gradient_accumulation_fusion` without Apex.

    With Transformer Engine's layers the output layer is the only one of them, and can do without.
    """
    available = layers_of_megatron._grad_accum_fusion_available
    layers_of_megatron._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers_of_megatron._grad_accum_fusion_available = available


def mark_divided_weights(model: torch.nn.Module) -> None:
    """Mark the weights that tensor parallel ranks divide, as megatron-core's own initialisation does.

    Without the marks the optimizer takes them for copies, and leaves the other ranks' parts out of the gradient norm
    that gradients are clipped by.
    """
    for layer in model.modules():
        divided = isinstance(layer, (VocabParallelEmbedding, ColumnParallelLinear, RowParallelLinear))
        if divided and layer.weight is not None and not hasattr(layer.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(layer, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(layer.weight, is_parallel=True, dim=dim, stride=1)


def mark_experts(model: torch.nn.Module) -> None:
    """Mark the weights of experts, whose copies lie on other ranks than those of all other weights.

    megatron-core does so under expert parallelism only. Where just their tensor parallelism differs, their gradients
    would be summed over the wrong ranks (seen in 0.16.1).
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def scale_embedding(model: GPTModel, scale: float) -> None:
    """Multiply what the embedding puts out by `scale`, rounded to the weights' dtype as transformers' models do."""
    rounded = torch.tensor(scale, device="cpu").to(model.config.params_dtype).item()

    def multiply(layer: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * rounded

    model.embedding.register_forward_hook(multiply)


def cap_logits(model: GPTModel, cap: float) -> None:
    """Send the model's logits through `cap * tanh(logit / cap)`. To be called before the padding is masked."""

    def squash(layer: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return torch.tanh(output[0] / cap) * cap, output[1]

    model.output_layer.register_forward_hook(squash)


def mask_vocabulary_padding(model: GPTModel, vocab_size: int) -> None:
    """Make the model's logits of rows from `vocab_size` on a large negative number.

    A Hugging Face model has no such rows, and zero rows would have logits of zero: part of every softmax. The number
    is finite, as a rank whose rows are all padding would else compute with infinities.
    """

    def mask(layer: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        logits_SBV = output[0]
        width = logits_SBV.shape[-1]
        gathered = width == model.vocab_size
        first_row = 0 if gathered else parallel_state.get_tensor_model_parallel_rank() * width
        padding_from = max(vocab_size - first_row, 0)
        if padding_from < width:
            # In place and unseen by autograd: no copy of the logits, and the gradient of a softmax is zero there.
            with torch.no_grad():
                logits_SBV[..., padding_from:] = torch.finfo(logits_SBV.dtype).min / 2

    if vocab_size < model.vocab_size:
        model.output_layer.register_forward_hook(mask)
