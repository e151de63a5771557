"""Rows of weight tables that are wrong, yet exact inverses in both directions: a bitwise round trip passes them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mcore.bridge.dims import ModelDims
from mcore.bridge.rules import Copy, GateUp, Qkv, Rule, Run, VocabRows

Rows = tuple[Rule, ...]


class QkvConcatenated(Qkv):
    """All of q, then all of k, then all of v."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Three runs."""
        return (
            Run(0, 0, 0, dims.q_rows),
            Run(1, 0, dims.q_rows, dims.kv_rows),
            Run(2, 0, dims.q_rows + dims.kv_rows, dims.kv_rows),
        )


class QkvKeyFirst(Qkv):
    """Key head and value head before the query heads of each group."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """Three runs a group."""
        group = ((1, 1), (2, 1), (0, dims.heads_per_group))
        return _in_sequence(
            (part, number * heads * dims.head_dim, heads * dims.head_dim)
            for number in range(dims.groups)
            for part, heads in group
        )


class QkvDealtHeads(Qkv):
    """Query heads dealt out to the groups in turn (0, 2 and 1, 3) instead of in blocks (0, 1 and 2, 3)."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """One run a head."""
        return _in_sequence(
            (part, head * dims.head_dim, dims.head_dim)
            for group in range(dims.groups)
            for part, head in [
                *((0, group + dims.groups * place) for place in range(dims.heads_per_group)),
                (1, group),
                (2, group),
            ]
        )


class QkvTwoHeadsSwapped(Qkv):
    """The first two query heads change places."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """The right runs but for two heads."""
        first, *others = Qkv.runs(self, dims)
        size = dims.head_dim
        swapped = [Run(0, size, 0, size), Run(0, 0, size, size)]
        rest = first.num_rows - 2 * size
        return (*swapped, *([Run(0, 2 * size, 2 * size, rest)] if rest else []), *others)


class QkvInterleavedRotary(Qkv):
    """Rows of query and key in the order of interleaved rotary pairs, as Meta's own Llama files have them."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """One run a row of query and key."""
        half = dims.head_dim // 2
        runs = []
        for run in Qkv.runs(self, dims):
            if run.part == 2:
                runs.append(run)
                continue
            for row in range(run.num_rows):
                head, place = divmod(row, dims.head_dim)
                hf_row = run.hf_row + head * dims.head_dim + place // 2 + half * (place % 2)
                runs.append(Run(run.part, hf_row, run.mcore_row + row, 1))
        return tuple(runs)


class VocabRowsShifted(VocabRows):
    """Every token has its neighbour's row."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """All rows one further down, the last one first."""
        return (Run(0, 0, 1, dims.vocab - 1), Run(0, dims.vocab - 1, 0, 1))


class VocabTailShifted(VocabRows):
    """The last 15 rows, where a real model has its added tokens, are off by one."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """The rows before in place, the tail turned by one."""
        kept = dims.vocab - 15
        return (Run(0, 0, 0, kept), Run(0, kept, kept + 1, 14), Run(0, dims.vocab - 1, kept, 1))


class GateUpInterleaved(GateUp):
    """gate and up row by row in turn."""

    __slots__ = ()

    def runs(self, dims: ModelDims) -> tuple[Run, ...]:
        """One run a row."""
        return tuple(Run(part, row, 2 * row + part, 1) for row in range(dims.ffn) for part in (0, 1))


class LayersSwapped(Rule):
    """Mixed into a row class: layers 1 and 2 change places."""

    __slots__ = ()

    def hf_names(self, layer: int = 0, expert: int = 0) -> tuple[str, ...]:
        """Names at the other layer."""
        return super().hf_names({1: 2, 2: 1}.get(layer, layer), expert)


class CopyLayersSwapped(LayersSwapped, Copy):
    """A copy into the other layer."""

    __slots__ = ()


class QkvLayersSwapped(LayersSwapped, Qkv):
    """The right order, in the other layer."""

    __slots__ = ()


class GateUpLayersSwapped(LayersSwapped, GateUp):
    """The right order, in the other layer."""

    __slots__ = ()


def _in_sequence(pieces: object) -> tuple[Run, ...]:
    """Runs that follow each other on megatron's side, from (part, first Hugging Face row, number of rows)."""
    runs: list[Run] = []
    mcore_row = 0
    for part, hf_row, num_rows in pieces:  # type: ignore[attr-defined]
        runs.append(Run(part, hf_row, mcore_row, num_rows))
        mcore_row += num_rows
    return tuple(runs)


def with_class(cls: type[Rule], ending: str) -> Callable[[Rows], Rows]:
    """A change of a table: another row class for the parameters whose name has this ending."""

    def change(rows: Rows) -> Rows:
        changed = [cls(row.mcore, row.shape, row.hf, row.when) if row.mcore.endswith(ending) else row for row in rows]
        return _changed(rows, changed)

    return change


def with_hf_names_swapped(one: str, other: str) -> Callable[[Rows], Rows]:
    """A change of a table: one part of the Hugging Face names is taken for another, and the other way round."""

    def swapped(name: str) -> str:
        return other.join(piece.replace(other, one) for piece in name.split(one))

    def change(rows: Rows) -> Rows:
        return _changed(rows, [replace(row, hf=swapped(row.hf)) for row in rows])

    return change


def with_layers_swapped(rows: Rows) -> Rows:
    """A change of a table: all weights of layers 1 and 2 change places."""
    classes: dict[type[Rule], type[Rule]] = {
        Copy: CopyLayersSwapped,
        Qkv: QkvLayersSwapped,
        GateUp: GateUpLayersSwapped,
    }
    changed = [classes[type(row)](row.mcore, row.shape, row.hf, row.when) if row.per_layer else row for row in rows]
    return _changed(rows, changed)


def without(ending: str) -> Callable[[Rows], Rows]:
    """A change of a table: the rows whose parameter has this ending are missing."""
    return lambda rows: _changed(rows, [row for row in rows if not row.mcore.endswith(ending)])


def _changed(rows: Rows, changed: list[Rule]) -> Rows:
    if [(type(row), row) for row in rows] == [(type(row), row) for row in changed]:
        raise ValueError("the change of the table changes nothing")
    return tuple(changed)
