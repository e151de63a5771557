"""What a conversion would do: every tensor's name, shape, bytes and source, the room that it takes, and the time.

The plan is the one that `convert` follows, made and checked in the same way; only no weights are moved.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mcore.bridge.check import Conversion, check, parameters
from mcore.bridge.output_file import OutputFile, stage_for
from mcore.bridge.plan import Step, global_shape
from mcore.bridge.spans import Span, SpanReader

COPIED_BYTES = 512 * 10**6
"""Bytes that are copied to see how fast it goes."""


def dry_run(
    hf: Path, output: Path, *, make_vocab_size_divisible_by: int = 128, disk_gb_per_s: float | None = None
) -> Iterator[str]:
    """Lines that say what `convert` of the same arguments would do. `output` is not touched.

    Args:
        hf: As for `convert`.
        output: Where it would write: its disk is looked at.
        make_vocab_size_divisible_by: As for `convert`.
        disk_gb_per_s: 10^9 bytes a second that can be copied to that disk; measured there if None.

    Raises:
        InputError: As `convert`.
    """
    checked = check(hf, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    checked.content()
    yield from _tensors(checked)
    num_bytes = sum(_sizes(checked).values())
    num_files = len({tensor.stored.file for tensor in checked.plan.hf.values()})
    numbers = sum(parameters(checked))
    yield ""
    yield f"{checked.num_stored} tensors in {num_files} files, {numbers / 1e9:.3f}e9 parameters"
    folder = next(path for path in output.absolute().parents if path.is_dir())
    free = shutil.disk_usage(folder).free
    verdict = "enough" if free > num_bytes else f"{(num_bytes - free) / 1e9:.1f} GB TOO LITTLE"
    yield f"room      {num_bytes / 1e9:.1f} GB to be written, {free / 1e9:.1f} GB free at {folder}: {verdict}"
    how = "as given"
    if disk_gb_per_s is None:
        disk_gb_per_s = _copying_gb_per_s(checked, folder)
        how = f"measured by copying {COPIED_BYTES / 1e6:.0f} MB of the model to {folder}"
    seconds = num_bytes / 1e9 / disk_gb_per_s
    yield f"time      {_duration(seconds)} at {disk_gb_per_s:.2f} GB/s, {how}"


def _tensors(checked: Conversion) -> Iterator[str]:
    """A line for each tensor of the checkpoint, as wide as its columns need."""
    sizes = _sizes(checked)
    rows = {"megatron-core": ("shape", "dtype", "GB", "Hugging Face")}
    for step in checked.plan.steps:
        if step.mcore_key not in rows:
            shape = str(list(global_shape(step, checked.plan.dims)))
            gigabytes = f"{sizes[step.mcore_key] / 1e9:.3f}"
            rows[step.mcore_key] = (shape, _dtype(step, checked), gigabytes, step.rule.hf)
    lines = [(key, *columns) for key, columns in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for key, shape, dtype, gigabytes, source in lines:
        yield f"{key:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {gigabytes:>{widths[3]}}  {source}"


def _sizes(checked: Conversion) -> dict[str, int]:
    """Bytes of each of megatron's tensors, by its key."""
    dims, sizes = checked.plan.dims, {}
    for step in checked.plan.steps:
        item_bytes = getattr(torch, _dtype(step, checked)).itemsize
        sizes[step.mcore_key] = math.prod(global_shape(step, dims)) * item_bytes
    return sizes


def _dtype(step: Step, checked: Conversion) -> str:
    return checked.plan.hf[step.hf_names[0]].dtype


def _copying_gb_per_s(checked: Conversion, folder: Path) -> float:
    """Speed of copying some of the weights as `convert` copies them, down to the disk."""
    spans, total = [], sum(_sizes(checked).values())
    left = COPIED_BYTES
    for tensor in checked.plan.hf.values():
        if left <= 0:
            break
        spans.append(Span(tensor.stored.file, tensor.stored.offset, min(left, tensor.stored.num_bytes)))
        left -= tensor.stored.num_bytes
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mcore-flows-") as copy, SpanReader(total) as reader:
        start = time.monotonic()
        file = OutputFile(Path(copy.name), stage_for(total))
        end = 0
        for block in reader.blocks(spans):
            end = file.write(block, end)
        file.close()
        return end / 1e9 / (time.monotonic() - start)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
