"""Which experts of a mixture-of-experts model the prompts reach: an expert that no token goes to proves nothing.

Counted on the transformers side, at the call of each layer's experts with the chosen experts' numbers. Where the usual
prompts leave experts out, prompts of seeded ids are added until all are reached or there are `MAX_EXTRA` of them.

Source: transformers 5.19: `experts(hidden_states, indices, weights)` in all of its mixture-of-experts models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MAX_EXTRA = 16
"""Prompts that are added at most."""


class ExpertCount:
    """How many tokens each expert of each layer got."""

    def __init__(self, model: Any, num_experts: int) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
        self.num_tokens = {layer_of(name): torch.zeros(num_experts, dtype=torch.long) for name in self._modules}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs the model."""
        handles = [
            module.register_forward_pre_hook(self._counter(layer_of(name)), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _counter(self, layer: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The first argument is the tokens; the second are the chosen experts, whatever a model calls them.
            chosen = args[1] if len(args) > 1 else list(kwargs.values())[len(args) == 0]
            counts = self.num_tokens[layer]
            counts += torch.bincount(chosen.flatten().cpu(), minlength=len(counts))

        return count

    def unreached(self) -> dict[int, tuple[int, ...]]:
        """Experts without a token, by layer; layers where all got some are left out."""
        missing = {layer: tuple((counts == 0).nonzero()[:, 0].tolist()) for layer, counts in self.num_tokens.items()}
        return {layer: experts for layer, experts in missing.items() if experts}


def layer_of(name: str) -> int:
    """The layer's number in a module's name.

    Raises:
        ValueError: The name has none.
    """
    found = re.search(r"\blayers\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"no layer number in {name}")
    return int(found[1])
