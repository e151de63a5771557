"""The two matrices of one adapter on this rank, and how tensor parallel ranks divide them.

r rank of the adapter
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from mcore.train.tuners.targets import Target


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's share of a matrix: part `rank` of `size` equal ones along `axis`; all of it with a size of 1."""

    axis: int
    rank: int = 0
    size: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of a matrix."""
        width = whole.shape[self.axis] // self.size
        return whole.narrow(self.axis, self.rank * width, width)


class Pair(torch.nn.Module):
    """A and B of one Hugging Face module: its weight `[out, in]` becomes `W + scale * B @ A`.

    Args:
        target: The module.
        rank: Of the adapter.
        in_size: Columns of A over all ranks.
        out_size: Rows of B over all ranks.
        share_a: This rank's part of A `[r, in]`.
        share_b: This rank's part of B `[out, r]`.
        like: The frozen weight, whose dtype and device the adapter has.
        seed: The run's. What A starts with follows from it and the module's name, whatever the layout.
    """

    def __init__(
        self,
        target: Target,
        *,
        rank: int,
        in_size: int,
        out_size: int,
        share_a: Share,
        share_b: Share,
        like: Tensor,
        seed: int,
    ) -> None:
        super().__init__()
        self.target = target
        self.shares = {"A": share_a, "B": share_b}
        self.shapes = {"A": (rank, in_size), "B": (out_size, rank)}
        self.of_expert = target.expert is not None
        first = first_values(target, rank, in_size, out_size, seed)
        self.lora_A = self._parameter(share_a.of(first["A"]), like, share_a)
        self.lora_B = self._parameter(share_b.of(first["B"]), like, share_b)

    def _parameter(self, values: Tensor, like: Tensor, share: Share) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(values.to(like.device, like.dtype, copy=True))
        # Copies of experts' gradients are summed over the ranks that have the same experts, which are others than
        # those that have the same attention as soon as either is divided in its own way.
        parameter.allreduce = not self.of_expert  # type: ignore[attr-defined]
        # In the gradients' norm every matrix must count once. megatron-core counts what is divided on every rank, and
        # other things on the first tensor parallel rank: of attention's, so of experts it must be told.
        if share.size > 1 or (self.of_expert and _tensor_rank(self.of_expert) == 0):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=share.axis, stride=1)
        elif self.of_expert:
            parameter.shared = True  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def fill(self, whole_a: Tensor, whole_b: Tensor) -> None:
        """Take this rank's parts of matrices `[r, in]` and `[out, r]`."""
        self.lora_A.copy_(self.shares["A"].of(whole_a))
        self.lora_B.copy_(self.shares["B"].of(whole_b))

    def matrices(self) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
        """Key in checkpoints and adapter files, letter, and this rank's part."""
        prefix = "lora_embedding_" if self.target.kind == "embedding" else "lora_"
        suffix = "" if self.target.kind == "embedding" else ".weight"
        for letter, parameter in (("A", self.lora_A), ("B", self.lora_B)):
            yield f"{self.target.hf_module}.{prefix}{letter}{suffix}", letter, parameter

    def sharded(self) -> dict[str, ShardedTensor]:
        """This rank's parts as megatron-core's checkpoints want them."""
        state = {}
        copy = (
            parallel_state.get_expert_data_parallel_rank()
            if self.of_expert
            else parallel_state.get_data_parallel_rank(with_context_parallel=True)
        )
        for key, letter, parameter in self.matrices():
            share = self.shares[letter]
            offsets = [(share.axis, share.rank, share.size)] if share.size > 1 else []
            among = 0 if offsets else _tensor_rank(self.of_expert)
            state[key] = ShardedTensor.from_rank_offsets(key, parameter, *offsets, replica_id=(0, among, copy))
        return state


def tensor_share(axis: int, *, of_expert: bool) -> Share:
    """The part of a divided matrix that this rank has."""
    return Share(axis, _tensor_rank(of_expert), _tensor_size(of_expert))


def _tensor_rank(of_expert: bool) -> int:
    rank: int = (
        parallel_state.get_expert_tensor_parallel_rank()
        if of_expert
        else parallel_state.get_tensor_model_parallel_rank()
    )
    return rank


def _tensor_size(of_expert: bool) -> int:
    size: int = (
        parallel_state.get_expert_tensor_parallel_world_size()
        if of_expert
        else parallel_state.get_tensor_model_parallel_world_size()
    )
    return size


def first_values(target: Target, rank: int, in_size: int, out_size: int, seed: int) -> dict[str, Tensor]:
    """What PEFT starts with: a model that is still the base. One matrix is random, the other one is zero.

    Source: peft 0.21 `LoraLayer.reset_lora_parameters`.
    """
    digest = hashlib.sha256(f"{seed} {target.hf_module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if target.kind == "embedding":
        return {"A": torch.zeros(rank, in_size), "B": torch.randn(out_size, rank, generator=generator)}
    bound = 1 / math.sqrt(in_size)
    return {
        "A": torch.empty(rank, in_size).uniform_(-bound, bound, generator=generator),
        "B": torch.zeros(out_size, rank),
    }
