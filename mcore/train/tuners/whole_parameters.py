"""Parameters that learn whole beside the adapters, and their places in checkpoints and adapter files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.backend.load import model_tensors
from mcore.bridge.plan import Step


@dataclass(frozen=True, slots=True)
class WholeParameter:
    """This rank's part of a tensor that learns whole.

    Attributes:
        key: Name of the Hugging Face tensor, which is its key in checkpoints and adapter files too.
        parameter: What learns.
        place: Its place in the whole tensor. megatron stacks layers; here each has a tensor of its own, since a run may
            name some of them only.
    """

    key: str
    parameter: torch.nn.Parameter
    place: ShardedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Over all ranks, with the vocabulary as wide as megatron's."""
        return tuple(self.place.global_shape)

    def sharded(self) -> ShardedTensor:
        """The parameter as megatron-core's checkpoints want it: anew each time, since saving takes the data away."""
        return replace(self.place, data=self.parameter)

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Take this rank's part of the whole tensor."""
        box = [slice(at, at + size) for at, size in zip(self.place.global_offset, self.parameter.shape, strict=True)]
        self.parameter.copy_(whole[tuple(box)])


def release_whole(module: GPTModel, chosen: Sequence[Step]) -> list[WholeParameter]:
    """Let the parameters of some steps learn, as far as this rank has them.

    Args:
        module: This rank's part of the model, or one of its parts; its parameters are frozen.
        chosen: From `choose_whole`.
    """
    by_place = {(step.mcore_key, step.index): step for step in chosen}
    found = []
    for tensor in model_tensors(module):
        depth = tensor.prepend_axis_num
        step = by_place.get((tensor.key, tuple(tensor.global_offset[:depth])))
        if step is None:
            continue
        (key,) = step.hf_names
        tensor.data.requires_grad_(True)
        place = replace(
            tensor,
            key=key,
            data=None,
            global_shape=tensor.global_shape[depth:],
            global_offset=tensor.global_offset[depth:],
            axis_fragmentations=tensor.axis_fragmentations[depth:],
            prepend_axis_num=0,
        )
        found.append(WholeParameter(key, tensor.data, place))
    return found
