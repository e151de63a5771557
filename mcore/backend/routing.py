"""A router that chooses and weighs experts as DeepSeek's models do, where megatron-core's router can't.

Legend: S sequence, B batch, T tokens (S * B), E experts, G groups, P experts of a group, K experts of a token
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore.backend.moe import Router
from mcore.bridge.features import Features


def choose_router(layer: ModuleSpec, features: Features) -> None:
    """Put `GroupedRouter` into the spec of a layer with experts, if the model needs it."""
    if features.expert_groups_by is not None or not features.expert_weights_sum_to_one:
        layer.submodules.mlp.submodules.router = partial(
            GroupedRouter,
            groups_by=features.expert_groups_by,
            weights_sum_to_one=features.expert_weights_sum_to_one,
        )


class GroupedRouter(Router):
    """Router whose groups are ranked by a number of their best experts, and whose weights need not sum to 1.

    Args:
        config: As of megatron-core's router.
        pg_collection: As of megatron-core's router.
        groups_by: Rank groups by the sum of this many best experts' scores; None: as megatron-core does.
        weights_sum_to_one: Whether sigmoid scores of a token's experts are divided by their sum.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        groups_by: int | None,
        weights_sum_to_one: bool,
    ) -> None:
        super().__init__(config, pg_collection)
        self.weights_sum_to_one = weights_sum_to_one
        if groups_by is not None:
            # megatron-core asks this for the choice of experts; it has it for a choice that was recorded before.
            self.router_replay = BestGroups(groups_by)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of experts, both `[T, E]`, of logits `[S, B, E]`."""
        weights_TE, chosen_TE = super().routing(logits, padding_mask)
        if self.weights_sum_to_one or self.score_function != "sigmoid" or self.topk == 1:
            return weights_TE, chosen_TE
        # megatron-core always divides by the sum: here it is multiplied again.
        scores_TE = logits.view_as(weights_TE).sigmoid()
        return weights_TE * (scores_TE * chosen_TE).sum(-1, keepdim=True), chosen_TE


class BestGroups:
    """The best experts of the best groups."""

    def __init__(self, groups_by: int) -> None:
        self.groups_by = groups_by

    def get_replay_topk(
        self,
        scores_TE: Tensor,
        topk: int,
        num_groups: int,
        group_topk: int,
        compute_topk: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of each token's experts, `[T, K]`, as megatron-core's router asks for them.

        Args:
            scores_TE: Scores, corrected by the bias if there is one.
            topk: Experts of a token.
            num_groups: Groups that the experts form, in order.
            group_topk: Groups that a token's experts may come from.
            compute_topk: What megatron-core would do.
        """
        scores_TGP = scores_TE.view(len(scores_TE), num_groups, -1)
        rank_TG = scores_TGP.topk(self.groups_by, dim=-1).values.sum(-1)
        is_best_TG = torch.zeros_like(rank_TG, dtype=torch.bool).scatter(1, rank_TG.topk(group_topk).indices, True)
        experts_TK = scores_TGP.masked_fill(~is_best_TG[..., None], -torch.inf).flatten(1).topk(topk).indices
        return scores_TE.gather(1, experts_TK), experts_TK
