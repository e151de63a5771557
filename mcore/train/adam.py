"""What megatron-core 0.16.1 does not do rightly for the Adams that it takes.

Transformer Engine's Adam keeps one step count in its groups; torch's keeps one in the state of each parameter, where
megatron-core's distributed optimizer, asked for `fully_reshardable`, neither expects nor restores it rightly.

As a precision-aware optimizer Transformer Engine's Adam keeps of each fp32 main weight the lower 16 bits, beside the
bf16 weight. megatron-core writes these bits into checkpoints as if they were the weight, and can't load them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mcore.errors import CheckpointError, Problem
from mcore.train import offload

OPTIMIZER, PARAMETERS = "optimizer", "param_state"
"""What megatron-core calls the settings of an optimizer's groups in its state, and the tensors of its parameters."""


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

    Raises:
        CheckpointError: The state of an optimizer that is not distributed was divided otherwise.
    """
    state = _in_parts_of(optimizer, state)
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
    offload.settle(optimizer)


@contextmanager
def step_count_everywhere(optimizer: MegatronOptimizer, step: int) -> Iterator[None]:
    """Let megatron-core find the step count also in a part of the optimizer that has no parameter on this rank.

    So it is with the part for experts on a pipeline stage that has none.
    """
    empty = [part.optimizer for part in _with_torch_adamw(optimizer) if not part.optimizer.state]
    for adam in empty:
        adam.state["no parameter"] = {"step": torch.tensor(float(step))}
    try:
        yield
    finally:
        for adam in empty:
            adam.state.pop("no parameter", None)


def _in_parts_of(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """A loaded state, in as many parts as the optimizer has.

    megatron-core gives experts a part of their own where they are divided in another way than other weights. Moments
    have their place in a checkpoint either way; settings of groups come in the parts that the saving layout had.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    # What was not asked for comes along: settings of a whole beside the parts' places, or of parts beside the whole's.
    was_whole = OPTIMIZER in state or 0 not in state
    if was_whole == (len(parts) == 1):
        return state
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        text = "the division of experts that it was saved with, or use_distributed_optimizer"
        raise CheckpointError("the optimizer can't be divided in another way", [Problem("layout", text, "another")])
    if not was_whole:
        settings = {name: value for name, value in state[0].items() if name != PARAMETERS}
        return settings | {PARAMETERS: state[PARAMETERS]}
    settings = {name: value for name, value in state.items() if not isinstance(name, int)}
    groups = settings[OPTIMIZER]["param_groups"]
    divided = {}
    for number, part in enumerate(parts):
        # What megatron-core finds the groups of a part by.
        of_experts = any(group["is_expert_parallel"] for group in part.optimizer.param_groups)
        own = {"param_groups": [{**group, "is_expert_parallel": of_experts} for group in groups]}
        divided[number] = settings | {OPTIMIZER: settings[OPTIMIZER] | own} | state[number]
    return divided


def keep_main_weights_whole(optimizer: MegatronOptimizer) -> None:
    """Have checkpoints of a precision-aware optimizer hold fp32 main weights, like all others; to the bit."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part.optimizer, "store_param_remainders", False):
            _join_and_split(part)


def _join_and_split(part: DistributedOptimizer) -> None:
    read, restore = part._get_main_param_and_optimizer_states, part._set_main_param_and_optimizer_states

    def weight_of(parameter: torch.nn.Parameter) -> Tensor:
        group, place = part.model_param_group_index_map[parameter]
        weight: Tensor = part.optimizer.param_groups[group]["params"][place]
        return weight

    def joined(parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = read(parameter)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = join_main_weight(weight_of(parameter), tensors["param"])
        return tensors

    def split(parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
        weight = weight_of(parameter)
        if weight.dtype == torch.bfloat16:
            rounded, remainder = split_main_weight(tensors["param"].to(weight.device))
            weight.detach().copy_(rounded)
            tensors = {**tensors, "param": remainder}
        restore(parameter, tensors)

    part._get_main_param_and_optimizer_states, part._set_main_param_and_optimizer_states = joined, split


def join_main_weight(rounded: Tensor, remainder: Tensor) -> Tensor:
    """An fp32 tensor of its bf16 rounding and the lower 16 bits that Transformer Engine keeps beside that.

    The upper half was rounded up where the lower one, as a signed number, is negative.
    Source: Transformer Engine, `common/multi_tensor/adam.cu`, `AdamFunctorMasterParamRemainder`.
    """
    upper = rounded.contiguous().view(torch.int16) - (remainder < 0).to(torch.int16)
    return torch.stack((remainder, upper), -1).view(torch.float32).squeeze(-1)


def split_main_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The opposite of `join_main_weight`: bf16 tensor and int16 remainder of an fp32 tensor."""
    remainder, upper = weight.contiguous().unsqueeze(-1).view(torch.int16).unbind(-1)
    return (upper + (remainder < 0).to(torch.int16)).view(torch.bfloat16), remainder.contiguous()


def _restore_without_step(part: DistributedOptimizer) -> None:
    restore = part._set_main_param_and_optimizer_states

    def with_own_step(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        restore(parameter, {**tensors, "step": part._get_main_param_and_optimizer_states(parameter)["step"]})

    part._set_main_param_and_optimizer_states = with_own_step


def _with_torch_adamw(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part
