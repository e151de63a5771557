"""Layers that predict further tokens (multi-token prediction, MTP): part of the model and of its checkpoints.

A layer takes the hidden states of the layer before it and the embedding of the next token, and predicts the token after
that. They are there for drafts of speculative decoding and carried along as they are: neither logits nor losses of the
model depend on them, and training leaves them alone.

Legend: S sequence, B batch, H hidden, V vocabulary
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor


def mtp_block_spec(
    config: TransformerConfig,
    decoder: TransformerBlockSubmodules,
    backend: Literal["torch", "transformer_engine"],
    *,
    norm: ModuleSpec,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """What a pipeline stage builds its layers for further tokens from; None if it has none. The last stage has all.

    Args:
        config: Of the whole model.
        decoder: Spec of the stage's decoder layers. The layers here look like the last of them.
        backend: Which layers.
        norm: Norm of backend `torch`.
        vp_stage: Which of this process's parts of the layers, with virtual pipeline stages.
    """
    if backend == "transformer_engine":
        return get_gpt_mtp_block_spec(config, decoder, use_transformer_engine=True, vp_stage=vp_stage)
    num_layers = get_mtp_num_layers_to_build(config, vp_stage=vp_stage)
    if not num_layers:
        return None
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        eh_proj=ColumnParallelLinear,
        transformer_layer=decoder.layer_specs[-1],
        layer_norm=norm,
    )
    layer = ModuleSpec(module=MultiTokenPredictionLayer, submodules=submodules)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * num_layers)


class GPTModelWithMtp(GPTModel):  # type: ignore[misc]
    """megatron-core's model with layers for further tokens that take no part in its forward pass.

    megatron-core's own forward pass runs them always, and can't give logits (0.16.1: it needs labels).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mtp_process:
            self.mtp.requires_grad_(False)

    def further_logits(self, ids_BS: Tensor, positions_BS: Tensor, hidden_SBH: Tensor) -> list[Tensor]:
        """Logits `[B, S, V]` of each depth, on the last stage; V is this rank's part of the padded vocabulary.

        Behind the end of a sequence there are tokens 0.

        Args:
            ids_BS: Tokens.
            positions_BS: Their positions.
            hidden_SBH: What the decoder put out for them, final norm included.
        """
        has_own_rotary = self.config.multi_latent_attention
        all_hidden_SBH = self.mtp(
            ids_BS,
            positions_BS,
            hidden_SBH,
            attention_mask=None,
            rotary_pos_emb=None if has_own_rotary else self.rotary_pos_emb(ids_BS.shape[1]),
            embedding=self.embedding,
        )
        _, *further = all_hidden_SBH.chunk(1 + len(self.mtp.layers))
        return [self.output_layer(of_depth)[0].transpose(0, 1) for of_depth in further]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's, which on the last of several stages can't do without metadata."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return sharded

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        *args: Any,
        runtime_gather_output: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits `[B, S, V]`, or losses `[B, S]` if there are labels; hidden states `[S, B, H]` between stages."""
        if not self.post_process:
            return hidden_states
        logits_SBV: Tensor = self.output_layer(hidden_states, runtime_gather_output=runtime_gather_output)[0]
        if labels is None:
            return logits_SBV.transpose(0, 1).contiguous()
        losses_BS: Tensor = self.compute_language_model_loss(labels, logits_SBV)
        return losses_BS
