"""From a Hugging Face folder to a megatron-core checkpoint, file to file: no model is built, memory stays flat."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcore.backend.meta import CheckpointContent, sharded_shapes
from mcore.bridge.dist_writer import DistWriter
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import copy_small_files, read_hf_config
from mcore.bridge.hf_files import StoredRows, open_tensor
from mcore.bridge.hf_headers import StoredTensor, read_headers
from mcore.bridge.plan import Plan, Step, global_shape, plan_convert
from mcore.bridge.rules import Family
from mcore.errors import InputError, Problem, WeightPlanError
from mcore.folders import refuse_existing, whole_folder
from mcore.progress import progress, say
from mcore.select import RELEASE, TRACKER

HF_FOLDER = "hf"
"""Folder of a checkpoint with the base model's small files: what export needs beside the weights."""
CHUNK_BYTES = 128 * 2**20
"""A larger tensor is written in chunks of whole rows, so that neither writer nor reader ever holds much of it."""
ROWS_COMPARED = 4096
"""Rows of a tied model's two copies that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that was checked and can begin."""

    plan: Plan
    num_stored: int
    content: CheckpointContent


def convert(
    hf: Path,
    output: Path,
    *,
    make_vocab_size_divisible_by: int = 128,
    family: Family | None = None,
    source: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `output/release/`, the tracker, and `output/hf/` with the model's small files.

    Every tensor keeps its dtype. The same input gives the same bytes.

    Args:
        hf: A Hugging Face folder with safetensors.
        output: The checkpoint folder to make.
        make_vocab_size_divisible_by: Rows: the vocabulary is padded with zero rows to a multiple of this.
        family: The weight table to convert by; that of the config's architecture if None.
        source: What `hf` is: kept in `metrics.json`, so that it can be told later what the checkpoint was made of.
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
        num_bytes = _write_release(checked, folder / RELEASE)
        (folder / TRACKER).write_text(RELEASE)
        copy_small_files(hf, folder / HF_FOLDER)
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


def check(hf: Path, *, make_vocab_size_divisible_by: int = 128, family: Family | None = None) -> Conversion:
    """Compare config, headers and megatron's model. Reads no weights but those of a tied model's second copy.

    Arguments as in `convert`.

    Raises:
        InputError: As `convert`.
    """
    config = read_hf_config(hf)
    with _all_problems() as collect:
        with collect():
            family = family or family_of_config(config)
            dims = dims_of(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
            content = sharded_shapes(config, padded_vocab_size=dims.padded_vocab, params_dtype=torch.bfloat16)
        with collect():
            stored = read_headers(hf)
    shapes = {key: tensor.shape for key, tensor in content.tensors.items()}
    plan = plan_convert(family, dims, hf=stored, mcore_shapes=shapes)
    say(f"convert: {family.hf_architecture}, {len(stored)} tensors, {dims.num_layers} layers")
    for copy, original in plan.equal_hf:
        if not _equal(stored[copy], stored[original]):
            raise WeightPlanError(
                "the model says that its embeddings are tied, but its weights differ",
                [
                    Problem(
                        f"hf {copy}",
                        f"the same bytes as {original}",
                        "other ones",
                        "Set tie_word_embeddings to false in config.json if the model has an output layer of its own.",
                    )
                ],
            )
        say(f"convert: {copy} equals {original} bit for bit and is left out, as the embeddings are tied")
    for name in plan.ignored_hf:
        say(f"convert: {name} is left out, as the {family.name} table says")
    return Conversion(plan, len(stored), content)


def parameters(checked: Conversion) -> Iterator[int]:
    """Numbers in each Hugging Face tensor that is converted."""
    for step in checked.plan.steps:
        for shape in step.rule.hf_shapes(checked.plan.dims):
            yield math.prod(shape)


def _write_release(checked: Conversion, folder: Path) -> int:
    folder.mkdir()
    writer = DistWriter(folder)
    # One buffer for all chunks: fresh memory for each would cost as much as the copying itself.
    buffer = bytearray(max(_chunk_size(step, checked)[1] for step in checked.plan.steps))
    with progress("convert", len(checked.plan.steps), "tensors") as advance:
        for step in checked.plan.steps:
            _write_step(writer, step, checked, buffer)
            advance(1)
    for key in checked.content.objects:
        writer.write_empty_object(key)
    return writer.finish({"iteration": 0, "checkpoint_version": 3.0})


def _write_step(writer: DistWriter, step: Step, checked: Conversion, buffer: bytearray) -> None:
    dims = checked.plan.dims
    parts = [open_tensor(checked.plan.hf[name]) for name in step.hf_names]
    num_rows, *rest = step.rule.mcore_shape(dims)
    rows_of_chunk, _ = _chunk_size(step, checked)
    for first_row in range(0, num_rows, rows_of_chunk):
        shape = (min(rows_of_chunk, num_rows - first_row), *rest)
        chunk = torch.frombuffer(buffer, dtype=_dtype(step, checked), count=math.prod(shape)).view(shape).zero_()
        step.rule.fill_mcore(chunk, parts, dims, first_row)
        offsets = (*step.index, first_row, *(0 for _ in rest))
        chunk = chunk.view(*(1 for _ in step.index), *shape)
        writer.write_chunk(step.mcore_key, global_shape(step, dims), offsets, chunk)


def _chunk_size(step: Step, checked: Conversion) -> tuple[int, int]:
    """Rows of the chunks that a step's tensor is divided into, and bytes of one."""
    num_rows, *rest = step.rule.mcore_shape(checked.plan.dims)
    row_bytes = math.prod(rest) * _dtype(step, checked).itemsize
    rows_of_chunk = min(num_rows, max(1, CHUNK_BYTES // row_bytes))
    return rows_of_chunk, rows_of_chunk * row_bytes


def _dtype(step: Step, checked: Conversion) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, checked.plan.hf[step.hf_names[0]].dtype)
    return dtype


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes. NaN equals the same NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    for first_row in range(0, one.shape[0], ROWS_COMPARED):
        rows = slice(first_row, min(first_row + ROWS_COMPARED, one.shape[0]))
        if not torch.equal(StoredRows(one)[rows].view(torch.uint8), StoredRows(other)[rows].view(torch.uint8)):
            return False
    return True


@contextmanager
def _all_problems() -> Iterator[Any]:
    """Let several checks run although one fails, and raise what they found as one error."""
    errors: list[InputError] = []

    @contextmanager
    def collect() -> Iterator[None]:
        try:
            yield
        except InputError as error:
            errors.append(error)

    yield collect
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputError("; ".join(e.summary for e in errors), [problem for e in errors for problem in e.problems])
