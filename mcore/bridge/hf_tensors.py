"""Hugging Face tensors as the tables name them, found in what a folder's files store. No torch here.

A table names every expert's matrices one by one. Files hold them like that, or stacked over all experts, so a tensor
of a table may be a part of a stored one:

    layers.0.mlp.experts.3.up_proj.weight       stored under this name, or the lower half of expert 3 in
                                                layers.0.mlp.experts.gate_up_proj, `[experts, 2 ffn, hidden]`
    layers.0.mlp.experts.gate_up_proj[3].T      expert 3 of a stacked tensor `[experts, hidden, 2 ffn]`, transposed

Source: transformers 5.19 `conversion_mapping.py` (which names it stacks in memory).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mcore.bridge.dims import Shape
from mcore.bridge.hf_headers import StoredTensor

PART = re.compile(r"(?P<tensor>[^\[\]]+)\[(?P<index>\d+)\](?P<transposed>\.T)?")
EXPERT_MATRIX = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
Reading = Literal["plain", "transposed"]


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor that a table names: what it holds, and how it is read.

    `stored` is what is read: a stored tensor or a part of one, with a place of its own in the file. `source` is the
    name that the file has for the whole, of which this is `[index]` (None: all of it) from row `first_row` on.
    """

    name: str
    dtype: str
    shape: Shape
    stored: StoredTensor
    source: str
    index: int | None = None
    first_row: int = 0
    reading: Reading = "plain"

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensor that this one is made of."""
        return self.stored.num_bytes


@dataclass(frozen=True, slots=True)
class PartName:
    """The name of a table's tensor, taken apart."""

    tensor: str
    index: int | None
    transposed: bool


def part_name(name: str) -> PartName:
    """`experts.gate_up_proj[3].T` as tensor, index and whether it is transposed; any other name is a whole tensor."""
    found = PART.fullmatch(name)
    return (
        PartName(found["tensor"], int(found["index"]), bool(found["transposed"]))
        if found
        else PartName(name, None, False)
    )


def find_hf_tensors(names: Iterable[str], stored: Mapping[str, StoredTensor]) -> dict[str, HfTensor]:
    """Those of the named tensors that the files hold, in whatever form."""
    found = {}
    for name in names:
        if (tensor := _find(name, stored)) is not None:
            found[name] = tensor
    return found


def _find(name: str, stored: Mapping[str, StoredTensor]) -> HfTensor | None:
    if name in stored:
        whole = stored[name]
        return HfTensor(name, whole.dtype, whole.shape, whole, name)
    part = part_name(name)
    if part.index is not None and part.tensor in stored:
        return _part(name, stored[part.tensor], part.index, transposed=part.transposed)
    if (expert := EXPERT_MATRIX.fullmatch(name)) is not None:
        return _of_stacked_experts(name, expert, stored)
    return None


def _part(name: str, whole: StoredTensor, index: int, *, transposed: bool = False) -> HfTensor | None:
    if len(whole.shape) < 2 or index >= whole.shape[0]:
        return None
    num_bytes = whole.num_bytes // whole.shape[0]
    place = replace(whole, shape=whole.shape[1:], offset=whole.offset + index * num_bytes, num_bytes=num_bytes)
    shape = place.shape[::-1] if transposed else place.shape
    reading: Reading = "transposed" if transposed else "plain"
    return HfTensor(name, whole.dtype, shape, place, whole.name, index, reading=reading)


def _of_stacked_experts(name: str, expert: re.Match[str], stored: Mapping[str, StoredTensor]) -> HfTensor | None:
    matrix = expert["matrix"]
    joint = f"{expert['experts']}.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"
    if joint not in stored or (tensor := _part(name, stored[joint], int(expert["index"]))) is None:
        return None
    if matrix == "down_proj":
        return tensor
    num_rows, *rest = tensor.shape
    half = num_rows // 2
    first_row, num_bytes = (half if matrix == "up_proj" else 0), tensor.stored.num_bytes // 2
    place = replace(
        tensor.stored,
        shape=(half, *rest),
        offset=tensor.stored.offset + (num_bytes if first_row else 0),
        num_bytes=num_bytes,
    )
    return replace(tensor, shape=place.shape, stored=place, first_row=first_row)
