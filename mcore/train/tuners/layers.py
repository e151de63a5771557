"""What an adapter must know of a linear layer, whichever backend built it.

megatron-core's layers and Transformer Engine's have the same parts under other names. `Linear` is what both say.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

Division = Literal["column", "row"]


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, or one of the experts that a layer multiplies at once.

    Attributes:
        weight: This rank's part, `[out, in]`.
        division: What tensor parallel ranks divide: rows (`column` parallel, by its output) or columns (`row`
            parallel, by its input).
        group: The ranks that do.
        by_sequence: Whether they divide the tokens outside of the layer.
        inside_expert: Whether it belongs to an expert, whose ranks see the same tokens.
    """

    weight: Tensor
    division: Division
    group: dist.ProcessGroup
    by_sequence: bool
    inside_expert: bool

    @property
    def is_divided(self) -> bool:
        """Whether there are several ranks."""
        return self.group.size() > 1


def linear_of(layer: Any, *, inside_expert: bool, weight: str = "weight") -> Linear | None:
    """What a layer is; None if no adapter can be put on it.

    Args:
        layer: megatron-core's or Transformer Engine's.
        inside_expert: Whether it belongs to an expert.
        weight: Name of the weight, where the layer has several.
    """
    division = _division(layer)
    if division is None:
        return None
    if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
        return Linear(layer.weight, division, layer.tp_group, layer.sequence_parallel, inside_expert)
    return Linear(getattr(layer, weight), division, layer._tp_group, layer.config.sequence_parallel, inside_expert)


def weights_of_experts(layer: Any) -> Sequence[str]:
    """Names of the weights of a layer that multiplies all experts of this rank at once; none of other layers."""
    if not _have_engine():
        return ()
    from megatron.core.extensions import transformer_engine as engine

    if not isinstance(layer, engine.TEGroupedLinear):
        return ()
    return [f"weight{number}" for number in range(layer.num_gemms)]


def _division(layer: Any) -> Division | None:
    if isinstance(layer, ColumnParallelLinear):
        return "column"
    if isinstance(layer, RowParallelLinear):
        return "row"
    if not _have_engine():
        return None
    from megatron.core.extensions import transformer_engine as engine

    if isinstance(layer, (engine.TEColumnParallelLinear, engine.TEColumnParallelGroupedLinear)):
        return "column"
    if isinstance(layer, (engine.TERowParallelLinear, engine.TERowParallelGroupedLinear)):
        return "row"
    # What goes down to latents, whole on every rank: the gradients of what comes out are parts where there are several.
    is_whole = type(layer) is engine.TELinear and layer._tp_group.size() == 1
    return "column" if is_whole else None


def _have_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None
