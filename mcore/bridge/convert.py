"""From a Hugging Face folder to a megatron-core checkpoint, file to file: no model is built, memory stays flat."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mcore.bridge.check import Conversion, check, parameters
from mcore.bridge.dist_writer import DistWriter, Part, Written, bytes_of, write_metadata
from mcore.bridge.finite import is_finite, not_finite
from mcore.bridge.hf_config import CONFIG_FILE, HF_FOLDER, copy_small_files, read_hf_config
from mcore.bridge.hf_files import open_tensor
from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.output_file import stage_for
from mcore.bridge.plan import Step, global_shape
from mcore.bridge.rules import Family, Run
from mcore.bridge.spans import Span, SpanReader
from mcore.bridge.workers import Piece, divide, do_all
from mcore.errors import Problem, SourceError
from mcore.folders import refuse_existing, refuse_too_little_room, whole_folder
from mcore.progress import Advance, progress
from mcore.select import RELEASE, TRACKER

CHUNK_BYTES = 128 * 2**20
"""A larger tensor is written in chunks of whole rows, so that no reader ever has to hold much of it."""
COMPUTED_BYTES = 8 * 2**20
"""Bytes of a chunk that are computed at a time, where they are not simply copied."""


def convert(
    hf: Path,
    output: Path,
    *,
    make_vocab_size_divisible_by: int = 128,
    family: Family | None = None,
    source: str | None = None,
    num_workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `output/release/`, the tracker, and `output/hf/` with the model's small files.

    Every tensor keeps its dtype, but quantised ones become bfloat16. The same input and number of workers give the
    same bytes.

    Args:
        hf: A Hugging Face folder with safetensors.
        output: The checkpoint folder to make.
        make_vocab_size_divisible_by: Rows: the vocabulary is padded with zero rows to a multiple of this.
        family: The weight table to convert by; that of the config's architecture if None.
        source: What `hf` is: kept in `metrics.json`, so that it can be told later what the checkpoint was made of.
        num_workers: Processes that divide the work. Each writes a shard of its own.
        overwrite: Whether an existing `output` is replaced.

    Returns:
        Figures of the conversion, as in its `metrics.json`.

    Raises:
        InputError: What was given can't be converted: SourceError, ConfigError or WeightPlanError, with all findings.
    """
    start = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    checked = check(hf, make_vocab_size_divisible_by=make_vocab_size_divisible_by, family=family)
    with whole_folder(output, overwrite=overwrite) as folder:
        num_bytes = _write_release(checked, folder / RELEASE, num_workers)
        (folder / TRACKER).write_text(RELEASE)
        copy_small_files(hf, folder / HF_FOLDER)
        if checked.config != read_hf_config(hf):
            text = json.dumps(checked.config, indent=2, ensure_ascii=False)
            (folder / HF_FOLDER / CONFIG_FILE).write_text(text + "\n")
        metrics = {
            "num_tensors": checked.num_stored,
            "num_parameters": sum(parameters(checked)),
            "padded_vocab_size": checked.plan.dims.padded_vocab,
            "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
            **({} if source is None else {"source": source}),
            "bytes": num_bytes,
            "seconds": round(time.monotonic() - start, 3),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _write_release(checked: Conversion, folder: Path, num_workers: int) -> int:
    pieces = _pieces(checked)
    num_bytes = sum(piece.num_bytes for piece in pieces)
    refuse_too_little_room(folder, num_bytes)
    folder.mkdir()
    shares = divide(pieces, num_workers)
    tasks = [partial(_write_shard, checked, folder, number, share, num_bytes) for number, share in enumerate(shares)]
    with progress("convert", num_bytes, "bytes") as bar:

        def advance(count: int = 1, note: str = "") -> None:
            checked.look()
            bar(count, note)

        written, problems = zip(*do_all(tasks, advance), strict=True)
    if any(problems):
        found = dict.fromkeys(chain.from_iterable(problems))
        raise SourceError("the model's weights are not all finite numbers", found)
    objects = DistWriter(folder, len(shares))
    for key in checked.content().objects:
        objects.write_empty_object(key)
    pieces_written = chain(*written, objects.close())
    return write_metadata(folder, pieces_written, {"iteration": 0, "checkpoint_version": 3.0})


def _pieces(checked: Conversion) -> list[Piece]:
    """The chunks of the checkpoint: whole rows, as many as `CHUNK_BYTES` hold."""
    pieces = []
    for step in checked.plan.steps:
        num_rows, *rest = step.rule.mcore_shape(checked.plan.dims)
        row_bytes = math.prod(rest) * _dtype(step, checked).itemsize
        rows_of_chunk = min(num_rows, max(1, CHUNK_BYTES // row_bytes))
        for first_row in range(0, num_rows, rows_of_chunk):
            rows = slice(first_row, min(first_row + rows_of_chunk, num_rows))
            pieces.append(Piece(step, rows, (rows.stop - rows.start) * row_bytes))
    return pieces


def _write_shard(
    checked: Conversion, folder: Path, number: int, pieces: Sequence[Piece], all_bytes: int, advance: Advance
) -> tuple[list[Written], list[Problem]]:
    """Write a share of the chunks. Beside what was written come the Hugging Face tensors that hold NaN or infinity."""
    dims = checked.plan.dims
    writer = DistWriter(folder, number, stage_for(all_bytes))
    unsound: dict[tuple[str, ...], Step] = {}
    with SpanReader(all_bytes) as reader:
        for piece in pieces:
            step, rows = piece.step, piece.rows
            rest = step.rule.mcore_shape(dims)[1:]
            part = Part(
                step.mcore_key,
                global_shape(step, dims),
                str(_dtype(step, checked)).removeprefix("torch."),
                offsets=(*step.index, rows.start, *(0 for _ in rest)),
                sizes=(*(1 for _ in step.index), rows.stop - rows.start, *rest),
            )
            blocks = _blocks(step, rows, checked, reader)
            writer.write_blocks(
                part, _watched(blocks, _dtype(step, checked), partial(unsound.setdefault, step.hf_names, step))
            )
            advance(piece.num_bytes)
    return writer.close(), [problem for step in unsound.values() for problem in _not_finite(step, checked)]


def _watched(blocks: Iterator[memoryview], dtype: torch.dtype, note: Callable[[], object]) -> Iterator[memoryview]:
    """The same blocks; `note` is called where one holds NaN or infinity. They are in the cache, so it costs little."""
    for block in blocks:
        if not is_finite(torch.frombuffer(block, dtype=dtype)):
            note()
        yield block


def _not_finite(step: Step, checked: Conversion) -> list[Problem]:
    shapes = step.rule.hf_shapes(checked.plan.dims)
    return not_finite(
        (name, open_tensor(checked.plan.hf[name]), shape[0]) for name, shape in zip(step.hf_names, shapes, strict=True)
    )


def _blocks(step: Step, rows: slice, checked: Conversion, reader: SpanReader) -> Iterator[memoryview]:
    """What is to be written of a chunk: copied as it is where whole rows lie in the files, else computed."""
    sources = [checked.plan.hf[name] for name in step.hf_names]
    runs = list(step.rule.runs_within(rows.start, rows.stop, checked.plan.dims))
    if all(source.reading == "plain" for source in sources) and all(run.hf_step == 1 for run in runs):
        return reader.blocks(_spans(runs, rows, [source.stored for source in sources]))
    return _computed_blocks(step, rows, checked)


def _spans(runs: Sequence[Run], rows: slice, sources: Sequence[StoredTensor]) -> Iterator[Span]:
    """The rows of a chunk in the files, with zeros where no run says what they are."""
    row_bytes = sources[0].num_bytes // sources[0].shape[0]
    row = rows.start
    for run in sorted(runs, key=lambda run: run.mcore_row):
        yield Span(None, 0, (run.mcore_row - row) * row_bytes)
        source = sources[run.part]
        yield Span(source.file, source.offset + run.hf_row * row_bytes, run.num_rows * row_bytes)
        row = run.mcore_row + run.num_rows
    yield Span(None, 0, (rows.stop - row) * row_bytes)


def _computed_blocks(step: Step, rows: slice, checked: Conversion) -> Iterator[memoryview]:
    dims, dtype = checked.plan.dims, _dtype(step, checked)
    parts = [open_tensor(checked.plan.hf[name]) for name in step.hf_names]
    rest = step.rule.mcore_shape(dims)[1:]
    rows_of_block = max(1, COMPUTED_BYTES // (math.prod(rest) * dtype.itemsize))
    for first_row in range(rows.start, rows.stop, rows_of_block):
        block = torch.zeros(min(rows_of_block, rows.stop - first_row), *rest, dtype=dtype)
        step.rule.fill_mcore(block, parts, dims, first_row)
        yield bytes_of(block)


def _dtype(step: Step, checked: Conversion) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, checked.plan.hf[step.hf_names[0]].dtype)
    return dtype
