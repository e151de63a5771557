"""Main weights and moments in the host's memory: megatron-core's `HybridDeviceOptimizer`, and its state in checkpoints.

It is two optimizers in one: torch's AdamW on fp32 copies in the host's memory, and Transformer Engine's Adam on what
stays on the GPU. What megatron-core 0.16.1 does not do rightly with it:

* It makes a state to load into by a step on random gradients, which also moves the weights that were loaded before.
* Settings of its groups hold classes, and so would checkpoints, which are to be read without running anything.
* A loaded step count stays in its own groups, from where it is given to the GPU's part anew before each step.
* What is loaded of a divided tensor is a view of the whole one, which stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
CLASSES = ("cpu_optimizer_cls", "gpu_optimizer_cls")
"""Settings of groups that are no plain values. They are made anew with the optimizer."""


def prime(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state it has after no step: zeros."""
    for hybrid in _hybrids(optimizer):
        for part in hybrid.sub_optimizers:
            for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
                part.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
                if isinstance(part, torch.optim.AdamW):
                    part.state[parameter]["step"] = torch.tensor(0.0)
        hybrid._sync_sub_optimizers_state_to_hdo()


def settle(optimizer: MegatronOptimizer) -> None:
    """Put right what `load_state_dict` left: step counts where each part counts, and tensors of their own size."""
    for hybrid in _hybrids(optimizer):
        steps = {int(group.pop("step")) for group in hybrid.param_groups if "step" in group}
        for part in hybrid.sub_optimizers:
            by_parameter = isinstance(part, torch.optim.AdamW)
            for group in part.param_groups:
                group.pop("step", None)
                if not by_parameter and steps:
                    (group["step"],) = steps
            for parameter, state in part.state.items():
                state |= {name: state[name].clone() for name in MOMENTS}
                state["master_param"] = parameter
                if not by_parameter:
                    state.pop("step", None)


def without_classes(state: Mapping[str, Any]) -> None:
    """Take what is no plain value out of the groups of an optimizer's state, as it goes into a checkpoint."""
    for group in state.get("optimizer", {}).get("param_groups", ()):
        for name in CLASSES:
            group.pop(name, None)


def _hybrids(optimizer: MegatronOptimizer) -> Iterator[HybridDeviceOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            yield part.optimizer
