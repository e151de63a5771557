"""The kinds of row a weight table has.

A row is one megatron parameter, its shape, and the Hugging Face tensors it is made of. All rows move whole runs of
rows, so a row class says just one thing: which run of which Hugging Face tensor stands where. Shapes of the Hugging
Face side, both directions, and their being exact inverses all follow from that. Rows of megatron's tensor that no run
covers are padding: zeros on the way in, left out on the way back.

Nothing here imports torch: tensors are only sliced and assigned.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mcore.bridge.dims import ModelDims, Shape
from mcore.bridge.features import Features

if TYPE_CHECKING:
    from torch import Tensor

LAYER = "{L}"
"""Stands for the layer's number in the names of a table; in Hugging Face names of further-token layers it goes on
behind the decoder's last layer, as the files number them."""
MTP = "{M}"
"""Stands for the number of a further-token layer (MTP), counted from 0, in megatron's names."""
EXPERT = "{E}"
"""Stands for the expert's number in Hugging Face names. megatron stacks experts on an axis of their own."""

DECODER, MTP_LAYER = "decoder.layers.{L}.", "mtp.layers.{M}.transformer_layer."


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that both sides hold.

    `num_rows` of Hugging Face tensor number `part`, every `hf_step`-th from `hf_row` on, are megatron's rows from
    `mcore_row` on.
    """

    part: int
    hf_row: int
    mcore_row: int
    num_rows: int
    hf_step: int = 1

    @property
    def hf_rows(self) -> slice:
        """The rows in the Hugging Face tensor."""
        return slice(self.hf_row, self.hf_row + (self.num_rows - 1) * self.hf_step + 1, self.hf_step)


@dataclass(frozen=True, slots=True)
class Rule(ABC):
    """One row of a table.

    Args:
        mcore: Name of the megatron parameter, with `{L}` for the layer or `{M}` for the further-token layer.
        shape: Its shape by names of `ModelDims`, without the axes that megatron stacks layers and experts on.
        hf: Names of the Hugging Face tensors; `{q,k,v}` stands for three, `{E}` for the expert. Where a file stacks
            experts itself, `name[{E}]` is one expert's part of it, and `.T` behind that a transposed one.
        when: What must hold, or the model or the layer has no such parameter: `dense` and `moe` of the layer's MLP,
            any other word is a switch of `ModelDims`. Several words must all hold; `!` in front says that it must not.
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
        """Whether every layer of the decoder may have such a parameter."""
        return LAYER in self.mcore

    @property
    def per_mtp_layer(self) -> bool:
        """Whether every further-token layer has such a parameter."""
        return MTP in self.mcore

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has such a parameter."""
        return EXPERT in self.hf

    def applies(self, dims: ModelDims, layer: int | None = None) -> bool:
        """Whether a model of these sizes has the parameter, in this layer."""
        return all(self._holds(word, dims, layer) for word in self.when.split())

    @staticmethod
    def _holds(word: str, dims: ModelDims, layer: int | None) -> bool:
        name = word.lstrip("!")
        if name in ("dense", "moe"):
            holds = layer is not None and dims.is_moe(layer) == (name == "moe")
        else:
            holds = bool(dims.size(name))
        return holds != word.startswith("!")

    def mcore_shape(self, dims: ModelDims) -> Shape:
        """Shape of megatron's tensor at one layer, of one expert."""
        return dims.shape(self.shape)

    def hf_names(self, layer: int = 0, expert: int = 0) -> tuple[str, ...]:
        """Names of the Hugging Face tensors at one layer, of one expert."""
        return tuple(name.replace(LAYER, str(layer)).replace(EXPERT, str(expert)) for name in alternatives(self.hf))

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
        for run in self.runs_within(first_row, first_row + out.shape[0], dims):
            out[run.mcore_row - first_row :][: run.num_rows] = parts[run.part][run.hf_rows]

    def hf_pieces(self, tensor: Tensor, dims: ModelDims, first_row: int = 0) -> Iterator[tuple[int, slice, Tensor]]:
        """Cut rows of megatron's tensor, from its `first_row` on, into rows of the Hugging Face tensors.

        Yields:
            Number of the Hugging Face tensor, its rows, and what they hold as a view of `tensor`. Padding is left out.
        """
        for run in self.runs_within(first_row, first_row + tensor.shape[0], dims):
            yield run.part, run.hf_rows, tensor[run.mcore_row - first_row :][: run.num_rows]

    def to_mcore(self, parts: Sequence[Tensor], dims: ModelDims) -> Tensor:
        """What megatron holds, made of the Hugging Face tensors. Always a new tensor."""
        tensor = parts[0].new_zeros(self.mcore_shape(dims))
        self.fill_mcore(tensor, parts, dims)
        return tensor

    def to_hf(self, tensor: Tensor, dims: ModelDims) -> tuple[Tensor, ...]:
        """The Hugging Face tensors, cut out of megatron's. Always new tensors; padding is left out."""
        parts = tuple(tensor.new_empty(shape) for shape in self.hf_shapes(dims))
        for part, rows, piece in self.hf_pieces(tensor, dims):
            parts[part][rows] = piece
        return parts

    def runs_within(self, first_row: int, end_row: int, dims: ModelDims) -> Iterator[Run]:
        """The runs, or what of them is in megatron's rows from `first_row` to before `end_row`."""
        for run in self.runs(dims):
            start = max(run.mcore_row, first_row)
            end = min(run.mcore_row + run.num_rows, end_row)
            if start < end:
                hf_row = run.hf_row + (start - run.mcore_row) * run.hf_step
                yield Run(run.part, hf_row, start, end - start, run.hf_step)


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
    """gate and up of equal size, and both joined: gate's rows first. Weight and bias, MLP and expert alike."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Gate, then up."""
        num_rows = self.mcore_shape(dims)[0] // 2
        return (Run(0, 0, 0, num_rows), Run(1, 0, num_rows, num_rows))


class InterleavedGateUp(Rule):
    """One tensor with a row of gate, a row of up, and so on; megatron has all of gate's rows first."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Even rows, then odd ones."""
        num_rows = self.mcore_shape(dims)[0] // 2
        return (Run(0, 0, 0, num_rows, hf_step=2), Run(0, 1, num_rows, num_rows, hf_step=2))


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


class FusedQkv(Qkv):
    """One tensor with all of q's rows, all of k's, all of v's; in megatron as `Qkv`."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """As `Qkv`, out of one tensor."""
        starts = (0, dims.q_rows, dims.q_rows + dims.kv_rows)
        return tuple(Run(0, starts[run.part] + run.hf_row, run.mcore_row, run.num_rows) for run in Qkv.runs(self, dims))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: its weight table and what its `config.json` means to megatron.

    Args:
        name: Module name under `mcore/bridge/families/`.
        hf_architecture: Class name in `config.json`'s `architectures`.
        hf_model_type: What `model_type` must be beside it: transformers builds by that.
        needed: Keys of `config.json`, beside those of every decoder, that may be null but not missing: transformers
            would take a certain model's number for them.
        rules: The weight table, one row a megatron parameter.
        ignored_hf: Names of Hugging Face tensors that are left out on purpose, with `{L}` for the layer.
        tied_hf: Hugging Face tensors that files may hold although another one stands for them, each with that other:
            they must be equal bit for bit, and the first is then left out. `{L}` is the number of a further-token
            layer, whose copies of embedding and head fall under this.
        transformer_config: From `config.json`'s mapping to the keyword arguments of megatron's `TransformerConfig` that
            follow from it (`activation_func` as a name). Raises ConfigError for what megatron can't express.
        sizes: From `config.json`'s mapping to fields of `ModelDims` that its common keys do not tell; keys that are no
            field go into `more`.
        features: From `config.json`'s mapping to what `TransformerConfig` has no field for. Raises ConfigError.
    """

    name: str
    hf_architecture: str
    hf_model_type: str
    needed: tuple[str, ...] = ()
    rules: tuple[Rule, ...]
    ignored_hf: tuple[str, ...] = ()
    tied_hf: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)
    transformer_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    sizes: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    features: Callable[[Mapping[str, Any]], Features] = lambda config: Features()


def mtp_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The decoder's rows of a layer again, for the layer inside of a further-token layer."""
    return tuple(
        replace(rule, mcore=rule.mcore.replace(DECODER, MTP_LAYER)) for rule in rules if rule.mcore.startswith(DECODER)
    )


def alternatives(pattern: str) -> tuple[str, ...]:
    """`a.{q,k}_proj` as `(a.q_proj, a.k_proj)`; a name without a comma list as itself."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return (pattern,)
    return tuple(pattern.replace(found[0], choice) for choice in found[1].split(","))
