"""LoRA on megatron-core's layers: the frozen layer's output plus `scale * B @ A` of its input.

A layer that holds several Hugging Face modules (q, k and v; gate and up) has a pair of matrices for each. The pair is
divided like the weight, so that no rank sends more than the narrow activations between A and B:

    column parallel   A whole on every rank, B by rows. What goes from A to B is gathered along the sequence (SP), or
                      copied; its gradient is summed over the ranks.
    row parallel      A by columns, B whole. What goes from A to B is summed over the ranks, and scattered (SP).
    experts           Ranks that share an expert already see the same tokens, and the dispatcher sums what they put out:
                      nothing is sent, but the gradient of the whole matrix is summed.

Legend: S sequence, B batch, T tokens, H hidden, O output, R sum of the ranks of a layer's pairs, r rank of one
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mcore.train.tuners.layers import Linear
from mcore.train.tuners.pair import Pair


class Adapter(torch.nn.Module):
    """What a layer's pairs have in common. It is a child of the layer, under the name `lora`.

    Args:
        group: The ranks that divide the frozen layer.
        pairs: One for each Hugging Face module with an adapter.
        scale: Factor on `B @ A`.
        dropout: Probability that a number of the input is left out, by each pair for itself.
    """

    def __init__(self, group: Any, pairs: Sequence[Pair], *, scale: float, dropout: float) -> None:
        super().__init__()
        self.pairs: Any = torch.nn.ModuleList(pairs)
        self.scale, self.dropout = scale, dropout
        self.group = group

    def down(self, inputs: Tensor, randomness: AbstractContextManager[Any], *, sum_gradient: bool = False) -> Tensor:
        """Scaled products `[…, R]` of the input `[…, H]` with every A.

        Args:
            inputs: The layer's.
            randomness: Entered while numbers are left out.
            sum_gradient: Whether A's gradient is summed over the ranks in backward.
        """
        matrices = [pair.lora_A for pair in self.pairs]
        if sum_gradient:
            matrices = [copy_to_tensor_model_parallel_region(matrix, group=self.group) for matrix in matrices]
        if not (self.training and self.dropout):
            return F.linear(inputs, torch.cat(matrices)) * self.scale
        with randomness:
            parts = [F.linear(F.dropout(inputs, self.dropout), matrix) for matrix in matrices]
        return torch.cat(parts, dim=-1) * self.scale


class LinearAdapter(Adapter, ABC):
    """On a linear layer, or on one expert of a layer that multiplies several at once.

    Args:
        linear: The frozen layer.
        pairs: As of `Adapter`.
        options: As of `Adapter`.
    """

    def __init__(self, linear: Linear, pairs: Sequence[Pair], **options: Any) -> None:
        super().__init__(linear.group, pairs, **options)
        self.inside_expert, self.by_sequence = linear.inside_expert, linear.by_sequence
        self.is_divided = linear.is_divided

    def put_on(self, layer: torch.nn.Module) -> None:
        """Have the frozen layer put out what the adapter adds, too."""
        layer.add_module("lora", self)
        layer.register_forward_hook(self._add, prepend=True)

    @abstractmethod
    def added(self, inputs: Tensor) -> Tensor:
        """What the adapter adds to the output `[…, O]` for an input `[…, H]`, in this rank's part of both."""

    @abstractmethod
    def delta(self) -> Tensor:
        """What the adapter adds to this rank's part of the weight, `[O, H]` in fp64."""

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return output[0] + self.added(inputs[0]), output[1]


class ColumnAdapter(LinearAdapter):
    """On a layer whose output is divided over the ranks.

    Args:
        linear: The frozen layer.
        pairs: As of `Adapter`.
        rows: Rows of the layer's weight on this rank that each pair's B belongs to, in B's order.
        options: As of `Adapter`.
    """

    def __init__(self, linear: Linear, pairs: Sequence[Pair], rows: Sequence[Tensor], **options: Any) -> None:
        super().__init__(linear, pairs, **options)
        self.num_rows = linear.weight.shape[0]
        self.rows = [numbers.to(linear.weight.device) for numbers in rows]
        if self.by_sequence and not self.inside_expert:
            for pair in pairs:
                pair.lora_A.sequence_parallel = True  # type: ignore[attr-defined]

    def up_matrix(self) -> Tensor:
        """Every B where its rows and its part of `R` are, `[O, R]`; zeros elsewhere."""
        rank = self.pairs[0].lora_B.shape[1]
        whole: Tensor = self.pairs[0].lora_B.new_zeros(self.num_rows, rank * len(self.pairs))
        for number, (pair, rows) in enumerate(zip(self.pairs, self.rows, strict=True)):
            whole[rows, number * rank : (number + 1) * rank] = pair.lora_B
        return whole

    def added(self, inputs: Tensor) -> Tensor:
        """As of `LinearAdapter`."""
        sums_itself = self.inside_expert and self.is_divided
        narrow = self.down(inputs, self._randomness(), sum_gradient=sums_itself)
        if self.is_divided and not self.inside_expert:
            if self.by_sequence:
                narrow = gather_from_sequence_parallel_region(narrow, group=self.group)
            else:
                narrow = copy_to_tensor_model_parallel_region(narrow, group=self.group)
        return F.linear(narrow, self.up_matrix())

    def _randomness(self) -> AbstractContextManager[Any]:
        """Ranks with different tokens draw differently, ranks with the same alike."""
        by_rank = self.by_sequence and self.is_divided and not self.inside_expert
        return _fork() if by_rank else nullcontext()

    def delta(self) -> Tensor:
        """As of `LinearAdapter`."""
        matrices = torch.cat([pair.lora_A for pair in self.pairs])
        return self.scale * (self.up_matrix().double() @ matrices.double())


class RowAdapter(LinearAdapter):
    """On a layer whose input is divided over the ranks. It has one pair."""

    def __init__(self, linear: Linear, pairs: Sequence[Pair], **options: Any) -> None:
        super().__init__(linear, pairs, **options)
        assert len(pairs) == 1, "the table has no row parallel layer with several modules"
        self.pair = pairs[0]
        if self.by_sequence and not self.inside_expert:
            self.pair.lora_B.sequence_parallel = True  # type: ignore[attr-defined]

    def added(self, inputs: Tensor) -> Tensor:
        """As of `LinearAdapter`."""
        narrow = self.down(inputs, self._randomness())
        matrix: Tensor = self.pair.lora_B
        if self.is_divided and self.inside_expert:
            matrix = copy_to_tensor_model_parallel_region(matrix, group=self.group)
        elif self.is_divided and self.by_sequence:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        elif self.is_divided:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return F.linear(narrow, matrix)

    def _randomness(self) -> AbstractContextManager[Any]:
        """Every rank has columns of its own."""
        if not self.is_divided:
            return nullcontext()
        return _fork(get_expert_parallel_rng_tracker_name()) if self.inside_expert else _fork()

    def delta(self) -> Tensor:
        """As of `LinearAdapter`."""
        return self.scale * (self.pair.lora_B.double() @ self.pair.lora_A.double())


class ExpertsAdapter(torch.nn.Module):
    """On a layer that multiplies all experts of this rank at once: each expert's adapter adds to its own tokens.

    Args:
        layer: The frozen layer. It is called with tokens `[T, H]`, in the order of the experts, and how many of them
            each expert has.
        adapters: Of each expert; None for one without.
    """

    def __init__(self, layer: torch.nn.Module, adapters: Sequence[LinearAdapter | None]) -> None:
        super().__init__()
        self.adapters = list(adapters)
        self.own = torch.nn.ModuleList(adapter for adapter in adapters if adapter is not None)
        layer.add_module("lora", self)
        layer.register_forward_hook(self._add, prepend=True)

    def _add(self, layer: Any, inputs: tuple[Tensor, Sequence[int]], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        tokens_TH, counts = inputs
        assert len(counts) == len(self.adapters), "there is not a number of tokens for each expert"
        parts = [
            tokens.new_zeros(len(tokens), output[0].shape[-1]) if adapter is None else adapter.added(tokens)
            for tokens, adapter in zip(torch.split(tokens_TH, list(counts)), self.adapters, strict=True)
        ]
        return output[0] + torch.cat(parts), output[1]


class RouterAdapter(Adapter):
    """On the matrix that gives experts their logits. In fp32, and without dropout, as the router itself."""

    def __init__(self, layer: TopKRouter, pairs: Sequence[Pair], **options: Any) -> None:
        super().__init__(None, pairs, **options)
        self.pair = pairs[0]
        for parameter in (self.pair.lora_A, self.pair.lora_B):
            parameter.sequence_parallel = layer.config.sequence_parallel  # type: ignore[attr-defined]
        frozen_gating = layer.gating

        def gating(hidden: Tensor) -> Tensor:
            narrow = F.linear(hidden.float(), self.pair.lora_A.float()) * self.scale
            logits: Tensor = frozen_gating(hidden)
            return logits + F.linear(narrow, self.pair.lora_B.float()).to(logits.dtype)

        layer.gating = gating
        layer.add_module("lora", self)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, in fp64."""
        return self.scale * (self.pair.lora_B.double() @ self.pair.lora_A.double())


class EmbeddingAdapter(Adapter):
    """On the embedding, whose rows are divided over the ranks: A `[r, vocabulary]` by columns, B `[H, r]` whole.

    Without dropout, as in PEFT.
    """

    def __init__(self, layer: VocabParallelEmbedding, pairs: Sequence[Pair], **options: Any) -> None:
        super().__init__(layer.tp_group, pairs, **options)
        self.pair = pairs[0]
        self.first, self.end = layer.vocab_start_index, layer.vocab_end_index
        self.scatters = layer.reduce_scatter_embeddings
        if self.scatters:
            self.pair.lora_B.sequence_parallel = True  # type: ignore[attr-defined]
        layer.add_module("lora", self)
        layer.register_forward_hook(self._add, prepend=True)

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids_BS = inputs[0]
        elsewhere = (ids_BS < self.first) | (ids_BS >= self.end)
        own_BS = (ids_BS - self.first).masked_fill(elsewhere, 0)
        narrow = F.embedding(own_BS, self.pair.lora_A.T).masked_fill(elsewhere.unsqueeze(-1), 0) * self.scale
        if self.scatters:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow.transpose(0, 1).contiguous(), group=self.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return output + F.linear(narrow, self.pair.lora_B)

    def delta(self) -> Tensor:
        """What the adapter adds to this rank's rows of the weight, in fp64."""
        return self.scale * (self.pair.lora_B.double() @ self.pair.lora_A.double()).T


def _fork(*name: str) -> AbstractContextManager[Any]:
    """Random numbers of this tensor parallel rank's own."""
    own: AbstractContextManager[Any] = get_cuda_rng_tracker().fork(*name)
    return own
