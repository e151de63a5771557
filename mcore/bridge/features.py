"""What an architecture does that megatron-core's `TransformerConfig` has no field for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryScale:
    """Queries are multiplied by `1 + beta * log(1 + floor(position / length))`, positions counted from 0."""

    beta: float
    length: int
    """Tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Properties of one model, read from its `config.json` by its family, built by `mcore.backend`."""

    windows: tuple[int | None, ...] = ()
    """Tokens that each decoder layer attends to, the token itself included (Hugging Face's `sliding_window`); None for
    all tokens before. Empty: no layer has a window."""
    attention_softcap: float | None = None
    """Attention scores go through `cap * tanh(score / cap)`."""
    logit_softcap: float | None = None
    """Logits go through `cap * tanh(logit / cap)`."""
    has_sinks: bool = False
    """Each query head has a learnt score that takes part in the softmax and adds nothing to the output."""
    norm_placement: Literal["before", "around", "behind"] = "before"
    """Where attention and MLP are normalised: their input, both input and output, or their output only."""
    norms_scale_in_fp32: bool = False
    """Norms are scaled in fp32 and then rounded, where Llama's are rounded first. Zero-centred ones always are."""
    qk_norm_over: Literal["head", "projection"] = "head"
    """What query and key are normalised over: each head by itself, where `qk_layernorm` is set; or their whole
    projection, where it must not be set (megatron would sum gradients that belong to different heads)."""
    embedding_scale: float | None = None
    """Factor on the embedding's output."""
    rope_of_layer: tuple[str, ...] = ()
    """Which entry of `config.json`'s `rope_parameters` each decoder layer uses, where it has one an attention type.
    Empty: all layers share the only one."""
    query_scale: QueryScale | None = None
    """How queries grow with their position, after they are turned; None if they do not."""
    attention_input_bias: bool | None = None
    """Whether the projections of query, key and value have a bias, where `add_bias_linear` and `add_qkv_bias` do not
    tell."""
    attention_output_bias: bool | None = None
    """Whether the attention's output projection has a bias, where `add_bias_linear` does not tell."""
    expert_groups_by: int | None = None
    """Where a token's experts come from its best groups: rank groups by the sum of this many best scores in them. None:
    as megatron-core does, by `moe_router_topk // moe_router_group_topk`."""
    expert_weights_sum_to_one: bool = True
    """Whether a sigmoid router divides the scores of a token's experts by their sum, as megatron-core always does."""
    num_labels: int | None = None
    """Rows of the head of a sequence classifier or reward model, which takes the vocabulary head's place."""
