"""From a megatron-core checkpoint to a Hugging Face folder, file to file: no model is built, memory stays flat."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mcore.bridge.convert import HF_FOLDER
from mcore.bridge.dist_dialects import EMBEDDING, read_weights
from mcore.bridge.dist_files import DistTensor
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import CONFIG_FILE, copy_small_files, exported_config, read_hf_config
from mcore.bridge.hf_files import SafetensorsWriter, TensorSpec, divide_into_shards
from mcore.bridge.hf_tensors import PartName, part_name
from mcore.bridge.plan import Plan, Step, mcore_shapes_of, plan_export
from mcore.folders import refuse_existing, whole_folder
from mcore.progress import progress, say
from mcore.select import select_checkpoint

TorchDtype = Literal["auto", "float32", "bfloat16", "float16"]


def export(
    checkpoint: Path,
    output: Path,
    *,
    hf: Path | None = None,
    iteration: int | None = None,
    torch_dtype: TorchDtype = "auto",
    max_shard_size_gb: float = 5.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint's weights as a Hugging Face folder that transformers and vLLM load.

    Args:
        checkpoint: Folder with the tracker and the iterations, whichever tool wrote them; or one iteration's own.
        output: The Hugging Face folder to make.
        hf: Folder with the base model's config and further small files; `hf/` of the checkpoint if None.
        iteration: Which iteration; the newest complete one if None.
        torch_dtype: Dtype of the written weights; `auto` keeps each tensor's.
        max_shard_size_gb: Largest safetensors file, in 10^9 bytes. A single larger tensor gets a file of its own.
        overwrite: Whether an existing `output` is replaced.

    Returns:
        Figures of the export, as in its `metrics.json`.

    Raises:
        CheckpointError: The checkpoint is missing, not complete or damaged.
        InputError: `hf` is missing (SourceError), or weights and config do not fit (ConfigError, WeightPlanError).
    """
    start = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    chosen = select_checkpoint(checkpoint, "latest" if iteration is None else "iteration", iteration)
    say(f"export: {chosen.path.name}, as {chosen.reason}")
    hf = hf or checkpoint / HF_FOLDER
    config = read_hf_config(hf)
    family = family_of_config(config)
    dims = dims_of(config)
    tensors = read_weights(chosen.path, mcore_shapes_of(family, dims))
    if EMBEDDING in tensors:
        dims = replace(dims, padded_vocab=tensors[EMBEDDING].shape[0])
    plan = plan_export(family, dims, mcore=tensors)
    specs = _specs(plan, tensors, torch_dtype)
    shards = divide_into_shards(specs.values(), int(max_shard_size_gb * 1e9))
    with whole_folder(output, overwrite=overwrite) as folder:
        copy_small_files(hf, folder)
        exported = exported_config(config, _main_dtype(specs))
        (folder / CONFIG_FILE).write_text(json.dumps(exported, indent=2, ensure_ascii=False) + "\n")
        with SafetensorsWriter(folder, shards) as writer:
            _write(writer, plan, tensors, specs)
        metrics = {
            "iteration": chosen.iteration,
            "num_tensors": len(specs),
            "num_files": len(shards),
            "bytes": writer.num_bytes,
            "seconds": round(time.monotonic() - start, 3),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _specs(plan: Plan, tensors: Mapping[str, DistTensor], torch_dtype: TorchDtype) -> dict[str, TensorSpec]:
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


def _main_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype that most of the model's bytes have: what a config names."""
    num_bytes: Counter[str] = Counter()
    for spec in specs.values():
        num_bytes[spec.dtype] += spec.num_bytes
    return num_bytes.most_common(1)[0][0]


def _write(
    writer: SafetensorsWriter, plan: Plan, tensors: Mapping[str, DistTensor], specs: Mapping[str, TensorSpec]
) -> None:
    with progress("export", len(plan.steps), "tensors") as advance:
        for step in plan.steps:
            parts = [part_name(name) for name in step.hf_names]
            dtype = getattr(torch, specs[parts[0].tensor].dtype)
            stored = tensors[step.mcore_key]
            if all(run.hf_step == 1 for run in step.rule.runs(plan.dims)) and not any(p.transposed for p in parts):
                _write_by_rows(writer, step, parts, stored, plan, dtype)
            else:
                _write_whole(writer, step, parts, stored, plan, dtype)
            advance(1)


def _write_by_rows(
    writer: SafetensorsWriter, step: Step, parts: Sequence[PartName], stored: DistTensor, plan: Plan, dtype: torch.dtype
) -> None:
    shapes = step.rule.hf_shapes(plan.dims)
    for window in stored.row_windows(step.index):
        rows = stored.read_rows(step.index, window).to(dtype)
        for number, hf_rows, piece in step.rule.hf_pieces(rows, plan.dims, window.start):
            first_row = (parts[number].index or 0) * shapes[number][0] + hf_rows.start
            writer.write_rows(parts[number].tensor, first_row, piece)


def _write_whole(
    writer: SafetensorsWriter, step: Step, parts: Sequence[PartName], stored: DistTensor, plan: Plan, dtype: torch.dtype
) -> None:
    """For rows that lie scattered in the file: one expert's matrix is put together first."""
    num_rows = step.rule.mcore_shape(plan.dims)[0]
    rows = stored.read_rows(step.index, slice(0, num_rows)).to(dtype)
    for part, whole in zip(parts, step.rule.to_hf(rows, plan.dims), strict=True):
        tensor = whole.T.contiguous() if part.transposed else whole
        writer.write_rows(part.tensor, (part.index or 0) * tensor.shape[0], tensor)
