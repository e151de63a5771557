"""Hugging Face tensors as the tables name them, found in what a folder's files store. No torch here.

A table names every expert's matrices one by one. Files hold them like that, or stacked over all experts, so a tensor
of a table may be a part of a stored one:

    layers.0.mlp.experts.3.up_proj.weight       stored under this name, or the lower half of expert 3 in
                                                layers.0.mlp.experts.gate_up_proj, `[experts, 2 ffn, hidden]`
    layers.0.mlp.experts.gate_up_proj[3].T      expert 3 of a stacked tensor `[experts, hidden, 2 ffn]`, transposed; or
                                                of MXFP4 blocks `[experts, 2 ffn, hidden / 32, 16]`, as they lie

Quantised weights are found under the same names, with their scales beside them, and are read as bfloat16.

Source: transformers 5.19 `conversion_mapping.py` (which names it stacks in memory), `integrations/mxfp4.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mcore.bridge.dims import Shape
from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.hf_quantised import DEQUANTISED, FP8_DTYPE, MX_BLOCK_BYTES, SCALE_DTYPES, Quantisation
from mcore.errors import Problem

PART = re.compile(r"(?P<tensor>[^\[\]]+)\[(?P<index>\d+)\](?P<transposed>\.T)?")
EXPERT_MATRIX = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
Reading = Literal["plain", "transposed", "fp8", "mxfp4"]


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A tensor that a table names: what it holds, and how it is read.

    `stored` is what is read: a stored tensor or a part of one, with a place of its own in the file. `source` is the
    name that the file has for the whole, of which this is `[index]` (None: all of it) from row `first_row` on.
    A quantised tensor has `scales` as well, `[rows / block rows, columns / block columns]`, or a part of them; None
    stands for scales that the files should hold and don't.
    """

    name: str
    dtype: str
    shape: Shape
    stored: StoredTensor
    source: str
    index: int | None = None
    first_row: int = 0
    reading: Reading = "plain"
    scales: StoredTensor | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensor that this one is made of."""
        return self.stored.num_bytes

    @property
    def claims(self) -> tuple[tuple[str, int], ...]:
        """Stored tensors that this one is made of, and how many bytes of each."""
        scales = () if self.scales is None else ((self.scales.name, self.scales.num_bytes),)
        return ((self.source, self.stored.num_bytes), *scales)


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


def find_hf_tensors(
    names: Iterable[str], stored: Mapping[str, StoredTensor], quantisation: Quantisation | None = None
) -> dict[str, HfTensor]:
    """Those of the named tensors that the files hold, in whatever form.

    Args:
        names: As the tables have them.
        stored: What the files' headers say, by name.
        quantisation: How quantised weights are stored, as the config says; without it they are found as they lie.
    """
    found = {}
    for name in names:
        if (tensor := _find(name, stored, quantisation)) is not None:
            found[name] = tensor
    return found


def scale_problems(found: Mapping[str, HfTensor], quantisation: Quantisation | None) -> list[Problem]:
    """Quantised tensors whose scales are missing or do not fit them."""
    problems = []
    for tensor in found.values():
        if tensor.reading == "mxfp4":
            name = f"{tensor.source.removesuffix('_blocks')}_scales"
        elif tensor.reading == "fp8" and quantisation is not None:
            name = quantisation.scale_name(tensor.source)
        else:
            continue
        shape, dtypes = _scales_wanted(tensor)
        if not is_whole(tensor):
            wanted = f"{' or '.join(dtypes)} {list(shape)}, the scales of {tensor.name}"
            there = "none" if tensor.scales is None else f"{tensor.scales.dtype} {list(tensor.scales.shape)}"
            problems.append(Problem(f"hf {name}", wanted, there, "Weights, scales and config.json disagree."))
    return problems


def is_whole(tensor: HfTensor) -> bool:
    """Whether a tensor has the scales that it is to be read with, if any."""
    if tensor.reading not in ("fp8", "mxfp4"):
        return True
    shape, dtypes = _scales_wanted(tensor)
    return tensor.scales is not None and tensor.scales.shape == shape and tensor.scales.dtype in dtypes


def activation_scales(
    found: Mapping[str, HfTensor], stored: Mapping[str, StoredTensor], quantisation: Quantisation | None
) -> set[str]:
    """Stored scales of activations, which a model that is no longer quantised has no use for."""
    if quantisation is None:
        return set()
    names = {quantisation.activation_scale_name(tensor.source) for tensor in found.values() if tensor.reading == "fp8"}
    return names & stored.keys()


def _find(name: str, stored: Mapping[str, StoredTensor], quantisation: Quantisation | None) -> HfTensor | None:
    if name in stored:
        whole = stored[name]
        tensor = HfTensor(name, whole.dtype, whole.shape, whole, name)
        if quantisation is None or quantisation.method == "mxfp4" or whole.dtype != FP8_DTYPE or len(whole.shape) != 2:
            return tensor
        return _block_scaled(tensor, stored, quantisation)
    part = part_name(name)
    if part.index is not None and part.transposed and f"{part.tensor}_blocks" in stored:
        return _mxfp4(name, part, stored)
    if part.index is not None and part.tensor in stored:
        return _part(name, stored[part.tensor], part.index, transposed=part.transposed)
    if (expert := EXPERT_MATRIX.fullmatch(name)) is not None:
        return _of_stacked_experts(name, expert, stored)
    return None


def _block_scaled(tensor: HfTensor, stored: Mapping[str, StoredTensor], quantisation: Quantisation) -> HfTensor:
    """The FP8 weight with its scales. A single scale may be stored as a number without axes."""
    block = quantisation.block_of(tensor.shape)
    tensor = replace(tensor, dtype=DEQUANTISED, reading="fp8", block=block)
    scales = stored.get(quantisation.scale_name(tensor.source))
    if scales is not None and math.prod(scales.shape) == 1 == math.prod(_scales_wanted(tensor)[0]):
        scales = replace(scales, shape=(1, 1))
    return replace(tensor, scales=scales)


def _mxfp4(name: str, part: PartName, stored: Mapping[str, StoredTensor]) -> HfTensor | None:
    """One expert of MXFP4 blocks `[experts, rows, blocks, 16]`, which hold the matrix transposed already."""
    blocks, scales = stored[f"{part.tensor}_blocks"], stored.get(f"{part.tensor}_scales")
    tensor = _part(name, blocks, part.index or 0) if len(blocks.shape) == 4 else None
    if tensor is None or (blocks.dtype, blocks.shape[-1]) != ("uint8", MX_BLOCK_BYTES):
        return tensor
    num_rows, num_blocks, block_bytes = tensor.stored.shape
    of_scales = None if scales is None else _part(name, scales, part.index or 0)
    return replace(
        tensor,
        dtype=DEQUANTISED,
        shape=(num_rows, 2 * num_blocks * block_bytes),
        reading="mxfp4",
        scales=None if of_scales is None else of_scales.stored,
        block=(1, 2 * block_bytes),
    )


def _scales_wanted(tensor: HfTensor) -> tuple[Shape, tuple[str, ...]]:
    """Shape and dtypes of a quantised tensor's scales."""
    shape = tuple(-(-size // of_block) for size, of_block in zip(tensor.shape, tensor.block, strict=True))
    return shape, ("uint8",) if tensor.reading == "mxfp4" else SCALE_DTYPES


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
