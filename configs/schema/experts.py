"""Fields of `train` that only models with experts (MoE) have, under megatron-core's names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class ExpertFields(StrictModel):
    """How the tokens of a step are balanced over experts. By default they are not, and no loss changes."""

    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Loss that balances experts: over a micro-batch (`aux_loss`) or over each sample (`seq_aux_loss`), or none."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the balancing loss, which is 1 where all experts get alike; it is no part of the recorded loss."""
    moe_z_loss_coeff: float | None = Field(default=None, gt=0)
    """Weight of the mean squared logsumexp of the routers' logits, which keeps these small; null for none."""
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0)
    """Tokens that an expert takes at most, by the number that it would get if all got alike; null for all. Each process
    counts its own part of a micro-batch, so that what is dropped depends on the layout."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert that is full drops: those of the lowest weight, or the last."""
    moe_router_bias_update_rate: float = Field(default=0.0, ge=0)
    """What each step adds to, or takes from, the routers' bias of an expert with too few or too many tokens; 0 leaves
    the bias as it is. For models whose routers have such a bias (DeepSeek-V3, GLM-4.5)."""

    def expert_problems(self) -> list[str]:
        """Settings that have no meaning without another."""
        problems = []
        if (self.moe_router_load_balancing_type == "none") != (self.moe_aux_loss_coeff == 0):
            problems.append("moe_router_load_balancing_type and moe_aux_loss_coeff belong together")
        if self.moe_token_drop_policy != "probs" and self.moe_expert_capacity_factor is None:
            problems.append("moe_token_drop_policy needs moe_expert_capacity_factor")
        return problems
