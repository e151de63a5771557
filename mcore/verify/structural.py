"""T0: what lies on disk on both sides holds the same bits, every tensor once.

Both sides are read again from their files, the Hugging Face one with the safetensors package. Row by row of the
family's table, megatron's tensor is cut into the Hugging Face tensors it is made of, and these must equal the stored
ones bit for bit. Where the dtypes differ (an export with a dtype of its own), megatron's values must be equal after
exactly that cast. Quantised tensors are dequantised for it by transformers' functions. A wrong table that is its own
inverse passes this proof: it takes the logits (T1) to see it.

One window of rows is in memory at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mcore.bridge.adapters import CONFIG as ADAPTER_CONFIG
from mcore.bridge.adapters import FOLDER as ADAPTER_FOLDER
from mcore.bridge.adapters import SavedAdapters, read_adapter_weights
from mcore.bridge.dims import ModelDims, Shape
from mcore.bridge.dist_dialects import EMBEDDING, read_weights
from mcore.bridge.dist_files import DistTensor
from mcore.bridge.finite import is_finite
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_headers import StoredTensor, read_headers
from mcore.bridge.hf_quantised import quantisation_of
from mcore.bridge.hf_tensors import HfTensor, activation_scales, find_hf_tensors, is_whole, scale_problems
from mcore.bridge.plan import Step, global_shape, ignored_names, mcore_shapes_of, steps_of, tied_copies
from mcore.bridge.rules import Family
from mcore.progress import progress
from mcore.verify.hf_reader import HfReader, bits
from mcore.verify.report import CastCount, StructuralResult, TensorFinding


def compare_on_disk(
    hf: Path,
    iteration_dir: Path,
    *,
    family: Family,
    dims: ModelDims,
    adapters: SavedAdapters | None = None,
    adapter_folder: Path | None = None,
) -> StructuralResult:
    """The whole structural proof.

    Args:
        hf: Hugging Face folder.
        iteration_dir: Folder of one iteration of a checkpoint.
        family: The table that says which rows belong together.
        dims: Sizes by the Hugging Face config; the padded vocabulary is taken from the checkpoint.
        adapters: What the Hugging Face side has on top of the checkpoint's weights.
        adapter_folder: Where it has them, beside weights that are the base's; None if they are merged.

    Raises:
        SourceError: The Hugging Face files are not whole.
        ConfigError: The config's quantisation can't be understood.
        CheckpointError: The checkpoint is not complete or can't be read.
    """
    start = time.monotonic()
    stored = read_headers(hf)
    quantisation = quantisation_of(read_hf_config(hf))
    saved = read_weights(iteration_dir, mcore_shapes_of(family, dims))
    if EMBEDDING in saved:
        dims = replace(dims, padded_vocab=saved[EMBEDDING].shape[0])
    steps = steps_of(family, dims)
    found = find_hf_tensors((name for step in steps for name in step.hf_names), stored, quantisation)
    ignored = sorted(ignored_names(family, dims, stored) | activation_scales(found, stored, quantisation))
    tied = tied_copies(family, dims, stored)
    findings = [
        *_hf_names(family, dims, steps, stored, found, explained={*ignored, *(copy for copy, _ in tied)}),
        *_mcore_names(family, dims, steps, saved),
        *(
            TensorFinding(tensor=problem.subject, kind="shape", detail=f"{problem.expected}, not {problem.found}")
            for problem in scale_problems(found, quantisation)
        ),
    ]
    casts: Counter[tuple[str, str]] = Counter()
    compared: list[HfTensor] = []
    num_mcore_tensors = 0
    reader = HfReader(stored, found)
    merged = adapters if adapter_folder is None else None
    with progress("bits on disk", len(steps), "tensors") as advance:
        findings += [
            TensorFinding(tensor=copy, kind="differs", detail=f"not the bits of {original}")
            for copy, original in tied
            if not reader.equal(copy, original)
        ]
        for step in steps:
            if _comparable(step, dims, found, saved):
                findings += _compare_step(step, dims, saved[step.mcore_key], reader, merged)
                compared += [found[name] for name in step.hf_names]
                casts.update((saved[step.mcore_key].dtype, found[name].dtype) for name in step.hf_names)
                num_mcore_tensors += 1
            advance(1)
    if adapters is not None:
        findings += _adapter_file(adapter_folder or hf / ADAPTER_FOLDER, adapters, dims)
    dtypes = {tensor.dtype for tensor in compared}
    has_casts = any(mcore != of_hf for mcore, of_hf in casts)
    return StructuralResult(
        num_hf_tensors=len(compared),
        num_mcore_tensors=num_mcore_tensors,
        num_bytes=sum(tensor.num_bytes for tensor in compared),
        casts=tuple(
            CastCount(mcore_dtype=mcore, hf_dtype=of_hf, num_tensors=count)
            for (mcore, of_hf), count in sorted(casts.items())
            if mcore != of_hf
        ),
        cast_to=next(iter(dtypes)) if has_casts and len(dtypes) == 1 else None,
        dequantised=tuple(sorted({tensor.source for tensor in compared if tensor.scales is not None})),
        ignored_hf=(*ignored, *(copy for copy, _ in tied)),
        findings=tuple(findings),
        seconds=round(time.monotonic() - start, 3),
    )


@dataclass(slots=True)
class _Difference:
    """What was found in one Hugging Face tensor so far, window by window."""

    num_compared_rows: int = 0
    num_values: int = 0
    num_different: int = 0
    largest: float = 0.0
    first: str = ""

    def add(self, first_row: int, hf: Tensor, mcore: Tensor) -> None:
        """Compare rows of both sides in the Hugging Face dtype."""
        self.num_compared_rows += hf.shape[0]
        self.num_values += hf.numel()
        if torch.equal(bits(hf), bits(mcore)):
            return
        different = bits(hf) != bits(mcore)
        if not self.num_different:
            row, *rest = different.nonzero()[0].tolist()
            values = (hf[row, *rest].item(), mcore[row, *rest].item())
            self.first = f"first at {[first_row + row, *rest]}: hf {values[0]:.9g}, mcore {values[1]:.9g}"
        self.num_different += int(different.sum())
        gap = (hf.double() - mcore.double()).abs().max().item()
        self.largest = gap if gap != gap else max(self.largest, gap)


def _compare_step(
    step: Step, dims: ModelDims, saved: DistTensor, reader: HfReader, adapters: SavedAdapters | None
) -> Iterator[TensorFinding]:
    mcore_name = step.mcore_name
    found = [_Difference() for _ in step.hf_names]
    finite = dict.fromkeys((mcore_name, *step.hf_names), True)
    for window in saved.row_windows(step.index):
        rows = saved.read_rows(step.index, window)
        finite[mcore_name] &= is_finite(rows)
        for part, places, piece in step.rule.hf_pieces(rows, dims, window.start):
            name = step.hf_names[part]
            hf_rows = reader.rows(name, places)
            finite[name] &= is_finite(hf_rows)
            wanted = piece.to(hf_rows.dtype)
            if adapters is not None:
                wanted = adapters.merged(name, places, piece, hf_rows.dtype)
            found[part].add(places.start, hf_rows, wanted)
    for name, are_all_finite in finite.items():
        if not are_all_finite:
            yield TensorFinding(tensor=name, kind="not finite", detail="holds NaN or infinity")
    for name, difference in zip(step.hf_names, found, strict=True):
        num_rows = reader.found[name].shape[0]
        if difference.num_compared_rows != num_rows:
            detail = f"{difference.num_compared_rows} of {num_rows} rows are in {mcore_name}"
            yield TensorFinding(tensor=name, kind="incomplete", detail=detail)
        if difference.num_different:
            dtypes = (saved.dtype, reader.found[name].dtype)
            cast = "" if dtypes[0] == dtypes[1] else f" after a cast from {dtypes[0]} to {dtypes[1]}"
            yield TensorFinding(
                tensor=name,
                kind="differs",
                detail=f"{difference.num_different} of {difference.num_values} values from {mcore_name}{cast}, "
                f"by up to {difference.largest:.3g}; {difference.first}",
            )


def _adapter_file(folder: Path, adapters: SavedAdapters, dims: ModelDims) -> Iterator[TensorFinding]:
    """The adapter's file must hold the checkpoint's bits, and its config say what the run's does."""
    if (folder / ADAPTER_CONFIG).read_text() != adapters.config_text:
        yield TensorFinding(tensor=ADAPTER_CONFIG, kind="differs", detail="the adapter's config is not the run's")
    found, wanted = read_adapter_weights(folder), adapters.without_padding(dims.vocab)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            side = "the adapter's file" if name in wanted else "the checkpoint"
            yield TensorFinding(tensor=name, kind="missing", detail=f"no such matrix in {side}")
        elif found[name].dtype != wanted[name].dtype or not torch.equal(bits(found[name]), bits(wanted[name])):
            yield TensorFinding(tensor=name, kind="differs", detail="the adapter's file has others than the checkpoint")


def _comparable(step: Step, dims: ModelDims, found: Mapping[str, HfTensor], saved: Mapping[str, DistTensor]) -> bool:
    """Whether both sides are there in the right shape; if not, there is a finding about it already."""
    tensor = saved.get(step.mcore_key)
    return (
        tensor is not None
        and tensor.shape == global_shape(step, dims)
        and dims.padded_vocab >= dims.vocab
        and all(
            name in found and found[name].shape == shape and is_whole(found[name])
            for name, shape in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True)
        )
    )


def _hf_names(
    family: Family,
    dims: ModelDims,
    steps: tuple[Step, ...],
    stored: Mapping[str, StoredTensor],
    found: Mapping[str, HfTensor],
    explained: set[str],
) -> Iterator[TensorFinding]:
    claims = Counter(name for step in steps for name in step.hf_names)
    for name, count in claims.items():
        if count > 1:
            yield TensorFinding(tensor=name, kind="claimed twice", detail=f"{count} rows of the {family.name} table")
    for step in steps:
        for name, shape in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True):
            if name not in found:
                yield TensorFinding(tensor=name, kind="missing", detail="no such tensor in the Hugging Face folder")
            elif found[name].shape != shape:
                yield _shape_finding(name, shape, found[name].shape)
    claims_of_bytes: Counter[str] = Counter()
    for tensor in found.values():
        for name, num_bytes in tensor.claims:
            claims_of_bytes[name] += num_bytes
    for name in sorted(stored.keys() - claims_of_bytes.keys() - explained):
        yield TensorFinding(tensor=name, kind="unclaimed", detail=f"the {family.name} table has no row for it")
    for name, count in claims_of_bytes.items():
        if count != stored[name].num_bytes:
            detail = f"rows of the {family.name} table take {count} of its {stored[name].num_bytes} bytes"
            yield TensorFinding(tensor=name, kind="incomplete", detail=detail)


def _mcore_names(
    family: Family, dims: ModelDims, steps: tuple[Step, ...], saved: Mapping[str, DistTensor]
) -> Iterator[TensorFinding]:
    claims = Counter(step.mcore_name for step in steps)
    for name, count in claims.items():
        if count > 1:
            yield TensorFinding(tensor=name, kind="claimed twice", detail=f"{count} rows of the {family.name} table")
    wanted = {step.mcore_key: global_shape(step, dims) for step in steps}
    for key, shape in wanted.items():
        if key not in saved:
            yield TensorFinding(tensor=key, kind="missing", detail="no such tensor in the checkpoint")
        elif saved[key].shape != shape:
            yield _shape_finding(key, shape, saved[key].shape)
    if dims.padded_vocab < dims.vocab:
        yield TensorFinding(
            tensor=EMBEDDING, kind="shape", detail=f"expected at least {dims.vocab} rows, found {dims.padded_vocab}"
        )
    for key in sorted(saved.keys() - wanted.keys()):
        yield TensorFinding(tensor=key, kind="unclaimed", detail=f"the {family.name} table has no row for it")


def _shape_finding(name: str, expected: Shape, found: Shape) -> TensorFinding:
    return TensorFinding(tensor=name, kind="shape", detail=f"expected {list(expected)}, found {list(found)}")
