"""Routers that balance their experts in training, with padding left out, the same in every layout.

megatron-core 0.16.1 weighs a balancing loss by the tokens of one tensor parallel rank, and by one sample of several, so
that it shrinks as a layout grows; and its count of an expert's tokens can't take a mask. Here a loss is a mean over the
tokens of a step, like the loss of the model itself, and padding counts nowhere and takes nobody's place.

Legend: S sequence, B batch, T tokens (S * B), H hidden, E experts, G groups of tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class BalancedRouter(TopKRouter):  # type: ignore[misc]
    """megatron-core's router with balancing losses and a capacity of its own, and a count of each expert's tokens.

    Attributes:
        trained_share: Of the tokens of a step, those that the model's loss is summed over. Gradients are divided by
            their number, so that a mean over all tokens has to be multiplied by this share.
        expert_tokens_E: Tokens that chose each expert since `take_expert_tokens`, on this rank.
    """

    trained_share = 1.0
    expert_tokens_E: Tensor | None = None

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        # Other parts of the layer must know of the capacity; megatron-core's router must not apply it.
        self.config = copy(config)
        self.config.moe_expert_capacity_factor = None
        self.capacity_factor = config.moe_expert_capacity_factor

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of experts, both `[T, E]`, of hidden states `[S, B, H]`.

        Args:
            input: Hidden states.
            padding_mask: True where there is no token, `[S, B]`.
        """
        weights_TE, chosen_TE = super().forward(input, padding_mask)
        if self.capacity_factor is None:
            return weights_TE, chosen_TE
        kept_TE = self._within_capacity(weights_TE.detach(), chosen_TE, padding_mask)
        return weights_TE * kept_TE, kept_TE

    def _within_capacity(self, weights_TE: Tensor, chosen_TE: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Of a choice `[T, E]`, as many tokens of each expert as it takes; none of padding."""
        if padding_mask is not None:
            chosen_TE = chosen_TE & ~padding_mask.flatten()[:, None]
        # Every token chooses `topk` experts, so that this is what each would get if all got alike.
        capacity = (chosen_TE.sum() / self.config.num_moe_experts * self.capacity_factor).ceil()
        if self.config.moe_token_drop_policy == "position":
            rank_TE = chosen_TE.cumsum(0) - 1
        else:
            by_weight_TE = weights_TE.masked_fill(~chosen_TE, -torch.inf).argsort(dim=0, descending=True, stable=True)
            rank_TE = by_weight_TE.argsort(0)
        kept_TE: Tensor = chosen_TE & (rank_TE < capacity)
        return kept_TE

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The logits `[T, E]`, with the gradient of their z-loss."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares_T = logits.logsumexp(-1).square()
        if padding_mask is not None:
            squares_T = squares_T * ~padding_mask
        return self._with_loss(logits, coefficient * squares_T.sum())

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """The weights `[T, E]`, with the gradient of a loss over all tokens of a micro-batch."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        return self._balanced(probs, coefficient, scores_for_aux_loss[:, None], routing_map[:, None])

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """The weights `[T, E]`, with the gradient of a loss over the tokens of each sample."""
        shape = (seq_length, bsz, self.config.num_moe_experts)
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        return self._balanced(probs, coefficient, scores_for_aux_loss.view(shape), routing_map.view(shape))

    def _balanced(self, weights_TE: Tensor, coefficient: float, scores_TGE: Tensor, chosen_TGE: Tensor) -> Tensor:
        """The loss of a group is `E * sum over experts of (share of the choices * mean score)`, 1 where all are alike.

        Scores are of this rank's tokens, choices of the group's: ranks that share a sample add up to the loss.
        """
        if coefficient == 0:
            return weights_TE
        counts_GE = chosen_TGE.sum(0).float()
        dist.all_reduce(counts_GE, group=self.tp_cp_group)
        num_tokens_G = (counts_GE.sum(-1) / self.topk).clamp(min=1)
        per_token_G = (scores_TGE.sum(0) * counts_GE).sum(-1) / (self.topk * num_tokens_G)
        return self._with_loss(weights_TE, coefficient * self.config.num_moe_experts * per_token_G.sum())

    def _with_loss(self, passed_on: Tensor, summed_over_tokens: Tensor) -> Tensor:
        scaled: Tensor = MoEAuxLossAutoScaler.apply(passed_on, summed_over_tokens * self.trained_share)
        return scaled

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count each expert's tokens `[E]` of a map `[T, E]`; where layers are recomputed, once. No compilation."""
        if not self.training or not torch.is_grad_enabled():
            return
        counts_E = (routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]).sum(0)
        self.expert_tokens_E = counts_E if self.expert_tokens_E is None else self.expert_tokens_E + counts_E
        if self.enable_expert_bias:
            # A wrapper for bf16 rounds it, in which 257 is 256.
            so_far_E: Tensor = self.local_tokens_per_expert  # type: ignore[has-type]
            self.local_tokens_per_expert = so_far_E.float() + counts_E


def set_trained_share(models: Iterable[GPTModel], share: float) -> None:
    """Tell all routers what share of the coming step's tokens is trained."""
    for router in _routers(models):
        router.trained_share = share


def take_expert_tokens(models: Iterable[GPTModel], num_layers: int, num_experts: int) -> list[list[int]]:
    """Tokens that each expert of each layer got since the last call, over all ranks, which all call it.

    Args:
        models: This rank's parts of the model.
        num_layers: Decoder layers of the whole model; those without experts count nothing.
        num_experts: Experts of a layer.
    """
    counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=torch.cuda.current_device())
    for router in _routers(models):
        if router.expert_tokens_E is not None:
            counts_LE[router.layer_number - 1] += router.expert_tokens_E
        router.expert_tokens_E = None
    dist.all_reduce(counts_LE)
    counts: list[list[int]] = counts_LE.tolist()
    return counts


def _routers(models: Iterable[GPTModel]) -> Iterator[BalancedRouter]:
    for model in models:
        for module in model.decoder.modules():
            if isinstance(module, BalancedRouter):
                yield module
