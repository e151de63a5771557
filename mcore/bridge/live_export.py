"""Safetensors straight out of a model of a running job: every rank writes its own rows and columns into shared files.

Rank 0 makes the files at their full length, with holes where the data goes; all ranks fill them at the same time. No
rank ever holds more than its own part of the model, and one expert's matrix where a file has its rows scattered.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from mcore.backend.load import model_tensors, over_all_ranks
from mcore.backend.parallel import on_rank_0
from mcore.bridge.dims import Shape
from mcore.bridge.dist_dialects import EMBEDDING
from mcore.bridge.dist_writer import bytes_of
from mcore.bridge.export import goes_by_rows, main_dtype, target, tensor_specs
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import CONFIG_FILE, copy_small_files, exported_config
from mcore.bridge.hf_tensors import part_name
from mcore.bridge.hf_writer import SafetensorsWriter, create_shards, divide_into_shards, refuse_gaps
from mcore.bridge.live import Part, parts_of
from mcore.bridge.plan import Plan, plan_export
from mcore.folders import whole_folder


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor of the model, over all ranks: its global shape, and torch's name of its dtype."""

    shape: Shape
    dtype: str


@torch.no_grad()
def save_safetensors(
    models: Sequence[GPTModel],
    hf_config: Mapping[str, Any],
    output: Path,
    *,
    small_files: Path,
    max_shard_size_gb: float = 5.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model's weights as a Hugging Face folder that transformers and vLLM load; all ranks call it.

    It holds the same bytes as a checkpoint of the model that is exported.

    Args:
        models: This rank's parts, from `mcore.backend.model.build_model`: one, or one a virtual pipeline stage.
        hf_config: Mapping of the model's `config.json`.
        output: The folder to make, on a file system that all ranks share. It appears whole or not at all.
        small_files: Folder of the base model, whose tokenizer and further small files are copied.
        max_shard_size_gb: Largest safetensors file, in 10^9 bytes. A single larger tensor gets a file of its own.
        overwrite: Whether an existing `output` is replaced.

    Returns:
        Figures, as in the folder's `metrics.json`.

    Raises:
        ConfigError: `output` is in the way.
        WeightPlanError: The model is not what the config says.
        ConversionError: A file can't be written.
    """
    start = time.monotonic()
    tensors = [tensor for model in models for tensor in model_tensors(model)]
    held = {
        key: _Held(tensor.shape, str(tensor.dtype).removeprefix("torch."))
        for key, tensor in over_all_ranks(tensors).items()
    }
    plan = on_rank_0(lambda: _plan(hf_config, held))
    specs = tensor_specs(plan, held)
    shards = divide_into_shards(specs.values(), int(max_shard_size_gb * 1e9))
    with _folder_of_all_ranks(output, overwrite=overwrite) as folder:
        places = on_rank_0(lambda: create_shards(folder, shards))
        writer = SafetensorsWriter(places)
        scattered: dict[str, list[Part]] = {}
        for part in parts_of(tensors, plan.steps):
            if not part.is_main:
                continue
            if goes_by_rows(part.step, plan):
                _write_rows(writer, part, plan)
            else:
                scattered.setdefault(part.step.mcore_name, []).append(part)
        for parts in scattered.values():
            _write_whole(writer, parts, plan)
        written: list[Counter[str]] = [Counter()] * dist.get_world_size()
        dist.all_gather_object(written, writer.close())
        refuse_gaps(places, written)
        metrics = {
            "num_tensors": len(specs),
            "num_files": len(shards),
            "bytes": sum(spec.num_bytes for spec in specs.values()),
            "seconds": round(time.monotonic() - start, 3),
        }
        if dist.get_rank() == 0:
            copy_small_files(small_files, folder)
            exported = exported_config(hf_config, main_dtype(specs))
            (folder / CONFIG_FILE).write_text(json.dumps(exported, indent=2, ensure_ascii=False) + "\n")
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _plan(hf_config: Mapping[str, Any], held: Mapping[str, _Held]) -> Plan:
    dims = dims_of(hf_config, make_vocab_size_divisible_by=held[EMBEDDING].shape[0])
    return plan_export(family_of_config(hf_config), dims, mcore=held)


@contextmanager
def _folder_of_all_ranks(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """`whole_folder` of rank 0 for all ranks: it takes its name when all have left the block."""
    with ExitStack() as stack:
        yield on_rank_0(lambda: stack.enter_context(whole_folder(output, overwrite=overwrite)))
        dist.barrier()
    dist.barrier()  # now it is there for every rank


def _write_rows(writer: SafetensorsWriter, part: Part, plan: Plan) -> None:
    """Write rows that lie together in the file, or this rank's columns of each."""
    shape = part.step.rule.mcore_shape(plan.dims)
    row_values, first_column = math.prod(shape[1:]), part.columns[0].start if part.columns else 0
    for number, hf_rows, piece in part.step.rule.hf_pieces(part.data, plan.dims, part.rows.start):
        name, first_row = target(part.step, plan, number, hf_rows.start)
        piece = piece.cpu()
        if piece.shape[1:] == shape[1:]:
            writer.write_rows(name, first_row, piece)
            continue
        for row_number, columns in enumerate(piece, first_row):
            first_byte = (row_number * row_values + first_column) * piece.itemsize
            writer.write_blocks(name, first_byte, [bytes_of(columns)])


def _write_whole(writer: SafetensorsWriter, parts: Sequence[Part], plan: Plan) -> None:
    """Write a tensor whose rows lie scattered in the file, out of this rank's parts, which are all there are.

    Only experts with biases are stored like that, and megatron-core can't divide those over ranks.
    """
    step = parts[0].step
    whole = parts[0].data.new_empty(step.rule.mcore_shape(plan.dims), device="cpu")
    assert sum(part.data.numel() for part in parts) == whole.numel(), step.mcore_name
    for part in parts:
        whole[part.rows, *part.columns] = part.data
    for name, tensor in zip(step.hf_names, step.rule.to_hf(whole, plan.dims), strict=True):
        of_file = part_name(name)
        rows = tensor.T.contiguous() if of_file.transposed else tensor
        writer.write_rows(of_file.tensor, (of_file.index or 0) * rows.shape[0], rows)
