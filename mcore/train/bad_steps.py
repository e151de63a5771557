"""Steps that must not be learnt from: what is wrong with one, and how its update is left out.

A step is judged between its backward pass and its update, on figures that all ranks share, so that all decide alike and
a run that is killed and started again decides as it did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

FEWEST_LOSSES = 8
"""Good losses without which nothing is called a spike."""


def what_is_wrong(
    loss: float, grad_norm: float, *, recent_losses: Sequence[float] = (), spike_factor: float | None = None
) -> str:
    """Why a step must not be learnt from; an empty text if it may.

    Args:
        loss: Mean over the step's trained tokens.
        grad_norm: Before clipping.
        recent_losses: Of the last good steps.
        spike_factor: What a loss may be at most, in their median; None for anything.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss}, gradient norm {grad_norm}"
    if spike_factor is None or len(recent_losses) < FEWEST_LOSSES:
        return ""
    usual = median(recent_losses)
    return f"loss {loss}, more than {spike_factor:g} times the usual {usual:.4f}" if loss > spike_factor * usual else ""


@torch.no_grad()
def update_unless(optimizer: MegatronOptimizer, is_bad: Callable[[float], bool]) -> float:
    """The optimizer's own step, unless its gradient norm is of a bad one. Returns the norm, before clipping.

    Source: megatron-core 0.16.1, `ChainedOptimizer.step`.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if is_bad(grad_norm):
        return grad_norm
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return grad_norm


def router_biases(modules: Iterable[GPTModel]) -> list[tuple[Tensor, Tensor]]:
    """Each router's bias that balances its experts, and a copy of it. The backward pass changes the bias."""
    buffers = [buffer for module in modules for name, buffer in module.named_buffers() if name.endswith(".expert_bias")]
    return [(bias, bias.clone()) for bias in buffers]


def put_back(biases: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Undo what happened to the biases since `router_biases`."""
    for bias, before in biases:
        bias.copy_(before)
