"""From a megatron-core checkpoint to a Hugging Face folder, file to file: no model is built, memory stays flat."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mcore.bridge.adapters import FOLDER as ADAPTER_FOLDER
from mcore.bridge.adapters import SavedAdapters, weights_and_adapters
from mcore.bridge.dist_dialects import EMBEDDING, read_weights
from mcore.bridge.dist_files import DistTensor
from mcore.bridge.dist_writer import bytes_of
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.finite import is_finite
from mcore.bridge.hf_config import CONFIG_FILE, HF_FOLDER, copy_small_files, exported_config, read_hf_config
from mcore.bridge.hf_tensors import part_name
from mcore.bridge.hf_writer import (
    Place,
    SafetensorsWriter,
    TensorSpec,
    create_shards,
    divide_into_shards,
    refuse_gaps,
)
from mcore.bridge.plan import Described, Plan, Step, mcore_shapes_of, plan_export
from mcore.bridge.spans import SpanReader
from mcore.bridge.workers import Piece, divide, do_all
from mcore.data.chat.served import Served, write_served_template
from mcore.errors import ConfigError, ConversionError, Problem
from mcore.findings import Findings
from mcore.folders import refuse_existing, refuse_too_little_room, whole_folder
from mcore.progress import Advance, progress, say
from mcore.select import select_checkpoint

TorchDtype = Literal["auto", "float32", "bfloat16", "float16"]
AS_THE_BASE = Served()


def export(
    checkpoint: Path,
    output: Path,
    *,
    hf: Path | None = None,
    base: Path | None = None,
    merge_lora: bool = True,
    iteration: int | None = None,
    torch_dtype: TorchDtype = "auto",
    max_shard_size_gb: float = 5.0,
    num_workers: int = 1,
    served: Served = AS_THE_BASE,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint's weights as a Hugging Face folder that transformers and vLLM load.

    Of a LoRA run they are the base's with the adapters merged into them; the adapter itself is in `adapter/`. Without
    `merge_lora` the folder is the PEFT adapter, and holds nothing else.

    Args:
        checkpoint: Folder with the tracker and the iterations, whichever tool wrote them; or one iteration's own.
        output: The Hugging Face folder to make.
        hf: Folder with the base model's config and further small files; `hf/` of the checkpoint if None.
        base: Checkpoint folder that a LoRA run started from; None of any other run.
        merge_lora: Whether the adapters of a LoRA run are merged into the base.
        iteration: Which iteration; the newest complete one if None.
        torch_dtype: Dtype of the written weights; `auto` keeps each tensor's.
        max_shard_size_gb: Largest safetensors file, in 10^9 bytes. A single larger tensor gets a file of its own.
        num_workers: Processes that divide the work. What they write does not depend on their number.
        served: What the chat template does for a server that is not told, as it was in training.
        overwrite: Whether an existing `output` is replaced.

    Returns:
        Figures of the export, as in its `metrics.json`.

    Raises:
        CheckpointError: The checkpoint is missing, not complete or damaged.
        ConversionError: Weights are too large for `torch_dtype`; names all of them.
        InputError: `hf` is missing (SourceError), or weights and config do not fit (ConfigError, WeightPlanError); or
            there is no adapter although `merge_lora` is False.
    """
    start = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    hf = hf or checkpoint / HF_FOLDER
    findings = Findings()
    chosen = findings.of(
        lambda: select_checkpoint(checkpoint, "latest" if iteration is None else "iteration", iteration)
    )
    config = findings.of(partial(read_hf_config, hf))
    if chosen is None or config is None:
        findings.raise_all()
    say(f"export: {chosen.path.name}, as {chosen.reason}")
    family = family_of_config(config)
    dims = dims_of(config)
    weights, adapters = weights_and_adapters(checkpoint, chosen.path, base)
    if not merge_lora:
        return _export_adapter(
            checkpoint,
            adapters,
            output,
            iteration=chosen.iteration,
            vocab_size=dims.vocab,
            torch_dtype=torch_dtype,
            overwrite=overwrite,
        )
    tensors = read_weights(weights, mcore_shapes_of(family, dims))
    if EMBEDDING in tensors:
        dims = replace(dims, padded_vocab=tensors[EMBEDDING].shape[0])
    plan = plan_export(family, dims, mcore=tensors)
    specs = tensor_specs(plan, tensors, torch_dtype)
    shards = divide_into_shards(specs.values(), int(max_shard_size_gb * 1e9))
    refuse_too_little_room(output, sum(spec.num_bytes for spec in specs.values()))
    with whole_folder(output, overwrite=overwrite) as folder:
        copy_small_files(hf, folder)
        write_served_template(folder, served)
        exported = exported_config(config, main_dtype(specs))
        (folder / CONFIG_FILE).write_text(json.dumps(exported, indent=2, ensure_ascii=False) + "\n")
        places = create_shards(folder, shards)
        pieces = divide(_pieces(plan, tensors), num_workers)
        with progress("export", sum(piece.num_bytes for share in pieces for piece in share), "bytes") as advance:
            tasks = [partial(_write_pieces, places, plan, tensors, adapters, share) for share in pieces]
            written, too_large = zip(*do_all(tasks, advance), strict=True)
        _refuse_overflow(set().union(*too_large), specs)
        refuse_gaps(places, written)
        if adapters is not None:
            adapters.write(folder / ADAPTER_FOLDER, vocab_size=dims.vocab)
        metrics = {
            "iteration": chosen.iteration,
            "num_tensors": len(specs),
            "num_files": len(shards),
            "bytes": sum(spec.num_bytes for spec in specs.values()),
            "seconds": round(time.monotonic() - start, 3),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _export_adapter(
    checkpoint: Path,
    adapters: SavedAdapters | None,
    output: Path,
    *,
    iteration: int | str,
    vocab_size: int,
    torch_dtype: TorchDtype,
    overwrite: bool,
) -> dict[str, Any]:
    start = time.monotonic()
    problems = []
    if adapters is None:
        problems.append(Problem(str(checkpoint), "the checkpoint of a LoRA run", "whole weights", "Leave it merged."))
    if torch_dtype != "auto":
        problems.append(Problem("torch_dtype", "auto, as an adapter is written as it was trained", torch_dtype))
    if problems or adapters is None:
        raise ConfigError("there is no adapter to be exported like this", problems)
    with whole_folder(output, overwrite=overwrite) as folder:
        adapters.write(folder, vocab_size=vocab_size)
        metrics = {
            "iteration": iteration,
            "num_tensors": len(adapters.matrices),
            "num_files": 1,
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "seconds": round(time.monotonic() - start, 3),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def tensor_specs(
    plan: Plan, tensors: Mapping[str, Described], torch_dtype: TorchDtype = "auto"
) -> dict[str, TensorSpec]:
    """Every tensor to be written, by name. Parts of a stacked one make one tensor."""
    specs: dict[str, TensorSpec] = {}
    for step in plan.steps:
        dtype = tensors[step.mcore_key].dtype if torch_dtype == "auto" else torch_dtype
        for name, shape in zip(step.hf_names, step.rule.hf_shapes(plan.dims), strict=True):
            part = part_name(name)
            if part.index is not None:
                shape = (plan.dims.size("experts"), *(reversed(shape) if part.transposed else shape))
            specs[part.tensor] = TensorSpec(part.tensor, dtype, shape)
    return specs


def main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype that most of the model's bytes have: what a config names."""
    num_bytes: Counter[str] = Counter()
    for spec in specs.values():
        num_bytes[spec.dtype] += spec.num_bytes
    return num_bytes.most_common(1)[0][0]


def _pieces(plan: Plan, tensors: Mapping[str, DistTensor]) -> list[Piece]:
    """What can be read and written by itself: rows of megatron's that no chunk reaches over, or all of a step's."""
    pieces = []
    for step in plan.steps:
        num_rows, *rest = step.rule.mcore_shape(plan.dims)
        stored = tensors[step.mcore_key]
        row_bytes = math.prod(rest) * getattr(torch, stored.dtype).itemsize
        windows = stored.row_windows(step.index) if goes_by_rows(step, plan) else [slice(0, num_rows)]
        pieces += [Piece(step, rows, (rows.stop - rows.start) * row_bytes) for rows in windows]
    return pieces


def goes_by_rows(step: Step, plan: Plan) -> bool:
    """Whether runs of megatron's rows lie together on the Hugging Face side as well."""
    return all(run.hf_step == 1 for run in step.rule.runs(plan.dims)) and not any(
        part_name(name).transposed for name in step.hf_names
    )


def _write_pieces(
    places: Mapping[str, Place],
    plan: Plan,
    tensors: Mapping[str, DistTensor],
    adapters: SavedAdapters | None,
    pieces: Sequence[Piece],
    advance: Advance,
) -> tuple[Counter[str], set[str]]:
    """Write a share of the work: bytes written of each tensor, and tensors with numbers that their dtype lacks."""
    writer = SafetensorsWriter(places)
    too_large: set[str] = set()
    with SpanReader(sum(place.spec.num_bytes for place in places.values())) as reader:
        for piece in pieces:
            stored = tensors[piece.step.mcore_key]
            of_step = adapters if adapters is not None and adapters.touch(piece.step) else None
            if of_step is not None or not _copy(writer, reader, piece, stored, plan, places, too_large):
                _compute(writer, piece, stored, plan, places, of_step, too_large)
            advance(piece.num_bytes)
    return writer.close(), too_large


def _copy(
    writer: SafetensorsWriter,
    reader: SpanReader,
    piece: Piece,
    stored: DistTensor,
    plan: Plan,
    places: Mapping[str, Place],
    too_large: set[str],
) -> bool:
    """Copy a piece's bytes as they are, or cast. False, and nothing is done, if they do not lie row by row."""
    step, rows = piece.step, piece.rows
    if not goes_by_rows(step, plan):
        return False
    runs = list(step.rule.runs_within(rows.start, rows.stop, plan.dims))
    spans = [stored.spans(step.index, slice(run.mcore_row, run.mcore_row + run.num_rows)) for run in runs]
    if None in spans:
        return False
    for run, of_run in zip(runs, spans, strict=True):
        name, first_row = target(step, plan, run.part, run.hf_row)
        spec = places[name].spec
        blocks = _cast(reader.blocks(of_run or ()), stored.dtype, spec.dtype, partial(too_large.add, name))
        num_values = math.prod(step.rule.mcore_shape(plan.dims)[1:])
        writer.write_blocks(name, first_row * num_values * getattr(torch, spec.dtype).itemsize, blocks)
    return True


def _cast(blocks: Iterable[memoryview], stored: str, written: str, note: Callable[[], object]) -> Iterable[memoryview]:
    """The blocks in another dtype. `note` is called where a number is too large for it."""
    if stored == written:
        return blocks
    source, target = getattr(torch, stored), getattr(torch, written)
    return (bytes_of(_rounded(torch.frombuffer(block, dtype=source), target, note)) for block in blocks)


def _rounded(tensor: Tensor, dtype: torch.dtype, note: Callable[[], object]) -> Tensor:
    rounded = tensor.to(dtype)
    if rounded is not tensor and not is_finite(rounded) and is_finite(tensor):
        note()
    return rounded


def _refuse_overflow(names: set[str], specs: Mapping[str, TensorSpec]) -> None:
    if names:
        raise ConversionError(
            "weights are too large for the dtype that is to be written",
            [
                Problem(f"hf {name}", f"numbers that {specs[name].dtype} has", "larger ones", "Set export.torch_dtype.")
                for name in sorted(names)
            ],
        )


def _compute(
    writer: SafetensorsWriter,
    piece: Piece,
    stored: DistTensor,
    plan: Plan,
    places: Mapping[str, Place],
    adapters: SavedAdapters | None,
    too_large: set[str],
) -> None:
    """For what lies scattered on either side, or has adapters: a piece is put together in memory first."""
    step, rows = piece.step, piece.rows
    dtype = getattr(torch, places[part_name(step.hf_names[0]).tensor].spec.dtype)
    tensor = stored.read_rows(step.index, rows)

    def written(number: int, hf_rows: slice, of_part: Tensor) -> Tensor:
        name = step.hf_names[number]
        note = partial(too_large.add, part_name(name).tensor)
        if adapters is None:
            return _rounded(of_part, dtype, note)
        merged = adapters.merged(name, hf_rows, of_part, dtype)
        if not is_finite(merged) and is_finite(of_part):
            note()
        return merged

    if goes_by_rows(step, plan):
        for number, hf_rows, of_part in step.rule.hf_pieces(tensor, plan.dims, rows.start):
            name, first_row = target(step, plan, number, hf_rows.start)
            writer.write_rows(name, first_row, written(number, hf_rows, of_part))
        return
    for number, whole in enumerate(step.rule.to_hf(tensor, plan.dims)):
        part = part_name(step.hf_names[number])
        whole = written(number, slice(0, whole.shape[0]), whole)
        of_part = whole.T.contiguous() if part.transposed else whole
        writer.write_rows(part.tensor, (part.index or 0) * of_part.shape[0], of_part)


def target(step: Step, plan: Plan, number: int, hf_row: int) -> tuple[str, int]:
    """The tensor to be written that a step's Hugging Face tensor is or is a part of, and the row in all of it."""
    part = part_name(step.hf_names[number])
    return part.tensor, (part.index or 0) * step.rule.hf_shapes(plan.dims)[number][0] + hf_row
