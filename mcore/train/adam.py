"""torch's AdamW inside megatron-core 0.16.1, which is written for Transformer Engine's where it is installed.

Transformer Engine's Adam keeps one step count in its groups; torch's keeps one in the state of each parameter, where
megatron-core's distributed optimizer, asked for `fully_reshardable`, neither expects nor restores it rightly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def fuse(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW update a parameter in one pass over memory instead of about ten."""
    for part in _with_torch_adamw(optimizer):
        for group in part.optimizer.param_groups:
            group["fused"] = True


def prime(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state it has after a first step; megatron-core can load into nothing less."""
    for part in _with_torch_adamw(optimizer):
        adam = part.optimizer
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            adam.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def load(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put a loaded state into the optimizer: `load_state_dict`, with every parameter's step count right.

    Args:
        optimizer: Primed.
        state: What `dist_checkpointing.load` made of its sharded state.
    """
    parts = list(_with_torch_adamw(optimizer))
    for part in parts:
        if isinstance(part, DistributedOptimizer):
            _restore_without_step(part)
    optimizer.load_state_dict(state)
    for part in parts:
        if isinstance(part, DistributedOptimizer):
            del part._set_main_param_and_optimizer_states
        for parameter_state in part.optimizer.state.values():
            # All of them hold one and the same tensor now, and each parameter's update adds 1 to it.
            parameter_state["step"] = parameter_state["step"].clone()


def _restore_without_step(part: DistributedOptimizer) -> None:
    restore = part._set_main_param_and_optimizer_states

    def with_own_step(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        restore(parameter, {**tensors, "step": part._get_main_param_and_optimizer_states(parameter)["step"]})

    part._set_main_param_and_optimizer_states = with_own_step


def _with_torch_adamw(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part
