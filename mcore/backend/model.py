"""megatron-core's GPTModel for a Hugging Face config: one function for training, proofs and conversion plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.rope import inverse_frequencies
from mcore.backend.specs import Backend, layer_spec
from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import ConfigError

ACTIVATIONS = {"silu": torch.nn.functional.silu}
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
    )
    frequencies = inverse_frequencies(hf_config)
    dims = dims_of(hf_config)
    model = GPTModel(
        config,
        layer_spec(config, backend),
        vocab_size=padded_vocab_size,
        max_sequence_length=hf_config.get("max_position_embeddings", 0),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        parallel_output=True,
    )
    # A plain attribute, as megatron has it: a buffer would lose its fp32 in `model.bfloat16()`.
    model.rotary_pos_emb.inv_freq = frequencies.to(torch.cuda.current_device())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    mark_divided_weights(model)
    if model.post_process:
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
    """megatron-core's config of the model. `options` are further fields of it.

    Raises:
        ConfigError: The architecture is unknown, has features that can't be built, or can't be divided this way.
    """
    family = family_of_config(hf_config)
    arguments = dict(family.transformer_config(hf_config))
    problems = layout.problems(hf_config, padded_vocab_size=padded_vocab_size)
    if problems:
        raise ConfigError("the model can't be divided this way", problems)
    arguments["activation_func"] = ACTIVATIONS[arguments["activation_func"]]
    engine = backend == "transformer_engine"
    return TransformerConfig(
        **arguments,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        fp16=params_dtype == torch.float16,
        # Weights always come from a checkpoint; `build_model` fills them with NaN, so a forgotten one shows.
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        # Each fusion needs CUDA, and Transformer Engine or Apex.
        bias_activation_fusion=engine,
        bias_dropout_fusion=engine,
        apply_rope_fusion=engine,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **options,
    )


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
