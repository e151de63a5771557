"""The kinds of row a weight table has.

A row is one megatron parameter, its shape, and the Hugging Face tensors it is made of. All rows of dense decoders move
whole runs of rows, so a row class says just one thing: which run of which Hugging Face tensor stands where. Shapes of
the Hugging Face side, both directions, and their being exact inverses all follow from that. Rows of megatron's tensor
that no run covers are padding: zeros on the way in, left out on the way back.

Nothing here imports torch: tensors are only sliced and assigned.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcore.bridge.dims import ModelDims, Shape

if TYPE_CHECKING:
    from torch import Tensor

LAYER = "{L}"
"""Stands for the layer's number in the names of a table."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows that both sides hold.

    `num_rows` of Hugging Face tensor number `part`, from `hf_row` on, are megatron's rows from `mcore_row` on.
    """

    part: int
    hf_row: int
    mcore_row: int
    num_rows: int

    @property
    def hf_rows(self) -> slice:
        """The rows in the Hugging Face tensor."""
        return slice(self.hf_row, self.hf_row + self.num_rows)


@dataclass(frozen=True, slots=True)
class Rule(ABC):
    """One row of a table.

    Args:
        mcore: Global name of the megatron parameter, with `{L}` for the layer.
        shape: Its shape by size names of `ModelDims`, without the layer axis that megatron stacks layers on.
        hf: Names of the Hugging Face tensors; `{q,k,v}` stands for three.
        when: A property of `ModelDims` that must be true, or the model has no such parameter.
    """

    mcore: str
    shape: str
    hf: str
    when: str = ""

    @abstractmethod
    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Which rows stand where."""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a parameter."""
        return LAYER in self.mcore

    @property
    def mcore_key(self) -> str:
        """The parameter's key in a checkpoint: megatron stacks the layers of a homogeneous decoder under one key."""
        return self.mcore.replace(f"{LAYER}.", "")

    def applies(self, dims: ModelDims) -> bool:
        """Whether a model of these sizes has the parameter."""
        return not self.when or bool(getattr(dims, self.when))

    def mcore_shape(self, dims: ModelDims) -> Shape:
        """Shape of megatron's tensor at one layer."""
        return dims.shape(self.shape)

    def hf_names(self, layer: int = 0) -> tuple[str, ...]:
        """Names of the Hugging Face tensors at one layer."""
        return tuple(name.replace(LAYER, str(layer)) for name in alternatives(self.hf))

    def hf_shapes(self, dims: ModelDims) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `hf_names`."""
        rows = [0] * len(alternatives(self.hf))
        for run in self.runs(dims):
            rows[run.part] += run.num_rows
        return tuple((num_rows, *self.mcore_shape(dims)[1:]) for num_rows in rows)

    def fill_mcore(self, out: Tensor, parts: Sequence[Any], dims: ModelDims, first_row: int = 0) -> None:
        """Fill the rows of megatron's tensor from `first_row` on, as many as `out` has.

        Args:
            out: Zeros, `[rows, …]`; rows of padding are left alone.
            parts: The Hugging Face tensors, or anything that gives their rows for a slice.
            dims: The model's sizes.
            first_row: Row of megatron's tensor that `out` starts with.
        """
        for run in self._runs_within(first_row, first_row + out.shape[0], dims):
            out[run.mcore_row - first_row :][: run.num_rows] = parts[run.part][run.hf_rows]

    def hf_pieces(self, tensor: Tensor, dims: ModelDims, first_row: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """Cut rows of megatron's tensor, from its `first_row` on, into rows of the Hugging Face tensors.

        Yields:
            Number of the Hugging Face tensor, its first row, and the rows as a view of `tensor`. Padding is left out.
        """
        for run in self._runs_within(first_row, first_row + tensor.shape[0], dims):
            yield run.part, run.hf_row, tensor[run.mcore_row - first_row :][: run.num_rows]

    def to_mcore(self, parts: Sequence[Tensor], dims: ModelDims) -> Tensor:
        """What megatron holds, made of the Hugging Face tensors. Always a new tensor."""
        tensor = parts[0].new_zeros(self.mcore_shape(dims))
        self.fill_mcore(tensor, parts, dims)
        return tensor

    def to_hf(self, tensor: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        """The Hugging Face tensors, cut out of megatron's. Always new tensors; padding is left out."""
        parts = tuple(tensor.new_empty(shape) for shape in self.hf_shapes(dims))
        for part, row, rows in self.hf_pieces(tensor, dims):
            parts[part][row : row + rows.shape[0]] = rows
        return parts

    def _runs_within(self, first_row: int, end_row: int, dims: ModelDims) -> Iterator[Run]:
        for run in self.runs(dims):
            start = max(run.mcore_row, first_row)
            end = min(run.mcore_row + run.num_rows, end_row)
            if start < end:
                yield Run(run.part, run.hf_row + start - run.mcore_row, start, end - start)


class Copy(Rule):
    """Same layout on both sides."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """All rows, in place."""
        return (Run(0, 0, 0, self.mcore_shape(dims)[0]),)


class VocabRows(Rule):
    """`[vocab, hidden]` and `[padded_vocab, hidden]`: megatron's vocabulary ends with rows of zeros."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """The vocabulary's rows, in place."""
        return (Run(0, 0, 0, dims.vocab),)


class GateUp(Rule):
    """gate and up, `[ffn, hidden]` each, and `[2 ffn, hidden]`: gate's rows first. Weight and bias alike."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Gate, then up."""
        return (Run(0, 0, 0, dims.ffn), Run(1, 0, dims.ffn, dims.ffn))


class Qkv(Rule):
    """q `[q_rows, hidden]`, k and v `[kv_rows, hidden]`, and `[qkv_rows, hidden]`. Weight and bias alike.

    megatron keeps each query group together: the group's query heads, its key head, its value head; then the next.
    Source: megatron-core 0.16.1, `SelfAttention.get_query_key_value_tensors`.
    """

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Query heads, key head and value head of each group."""
        runs = []
        mcore_row = 0
        for group in range(dims.groups):
            for part, heads in enumerate((dims.heads_per_group, 1, 1)):
                num_rows = heads * dims.head_dim
                runs.append(Run(part, group * num_rows, mcore_row, num_rows))
                mcore_row += num_rows
        return tuple(runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: its weight table and what its `config.json` means to megatron.

    Args:
        name: Module name under `mcore/bridge/families/`.
        hf_architecture: Class name in `config.json`'s `architectures`.
        rules: The weight table, one row a megatron parameter.
        ignored_hf: Names of Hugging Face tensors that are left out on purpose, with `{L}` for the layer.
        tied_hf: A Hugging Face tensor that files of tied models may hold although another one stands for it. It must
            equal that one bit for bit, and is then left out.
        transformer_config: From `config.json`'s mapping to the keyword arguments of megatron's `TransformerConfig` that
            follow from it (`activation_func` as a name). Raises ConfigError for what megatron can't express.
    """

    name: str
    hf_architecture: str
    rules: tuple[Rule, ...]
    ignored_hf: tuple[str, ...] = ()
    tied_hf: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    transformer_config: Callable[[Mapping[str, Any]], dict[str, Any]]

    def rules_for(self, dims: ModelDims) -> tuple[Rule, ...]:
        """The rows that a model of these sizes has."""
        return tuple(rule for rule in self.rules if rule.applies(dims))


def alternatives(pattern: str) -> tuple[str, ...]:
    """`a.{q,k}_proj` as `(a.q_proj, a.k_proj)`; a name without a comma list as itself."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return (pattern,)
    return tuple(pattern.replace(found[0], choice) for choice in found[1].split(","))
