"""Safetensors straight into a model of a running job: every rank reads its own rows and columns, and nothing else.

The rows of the family's table that convert a file tell as well which rows of which Hugging Face tensors a rank's part
of a parameter is made of, whatever the layout: the part's place in the global tensor is megatron's own
(`sharded_state_dict`), and the columns that tensor parallelism divides are cut out of the rows.
`mcore.bridge.live_export` goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.backend.load import (
    model_tensors,
    over_all_ranks,
    refuse_not_finite,
    refuse_overflow,
    say_what_is_lost,
    stacked_sizes,
)
from mcore.backend.meta import CheckpointContent
from mcore.backend.parallel import on_rank_0
from mcore.bridge.check import check
from mcore.bridge.dist_dialects import EMBEDDING
from mcore.bridge.finite import is_finite
from mcore.bridge.hf_files import open_tensor
from mcore.bridge.plan import Plan, Step


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one step's tensor.

    `data` is a view of the parameter, `[rows, …]`: rows `rows` of megatron's tensor, of which tensor parallelism may
    leave it only some `columns`. `is_main` says that of all ranks with the same part this is the one that saves it.
    """

    step: Step
    rows: slice
    columns: tuple[slice, ...]
    data: Tensor
    is_main: bool


def load_safetensors(models: Sequence[GPTModel], hf: Path) -> Mapping[str, Any]:
    """Fill a model with the weights of a Hugging Face folder; all ranks call it.

    Dtypes and quantised weights are dealt with as `mcore.bridge.convert` does; what it reads is then cast to the
    model's dtype.

    Args:
        models: This rank's parts, from `mcore.backend.model.build_model`: one, or one a virtual pipeline stage.
        hf: The folder, which every rank must see.

    Returns:
        The config of the model that the files hold.

    Raises:
        InputError: The folder does not hold this model; everything that `convert` would say, the same on every rank.
        CheckpointError: Weights are not finite, or too large for the model's dtype; names all, the same on every rank.
    """
    tensors = [tensor for model in models for tensor in model_tensors(model)]
    content = CheckpointContent(over_all_ranks(tensors), ())
    padded_vocab = content.tensors[EMBEDDING].shape[0]
    checked = on_rank_0(lambda: check(hf, make_vocab_size_divisible_by=padded_vocab, content=content))
    plan = checked.plan
    say_what_is_lost(tensors, {step.mcore_key: getattr(torch, plan.hf[step.hf_names[0]].dtype) for step in plan.steps})
    too_large = []
    with torch.no_grad():
        for part in parts_of(tensors, plan.steps):
            sources = [_Columns(open_tensor(plan.hf[name]), part.columns) for name in part.step.hf_names]
            part.data.zero_()  # rows of padding stay so
            part.step.rule.fill_mcore(part.data, sources, plan.dims, part.rows.start)
            too_large += _too_large(part, plan)
    refuse_overflow(too_large, hf)
    refuse_not_finite(models, hf)
    return checked.config


def _too_large(part: Part, plan: Plan) -> list[tuple[str, str]]:
    """Hugging Face tensors whose finite numbers the model's dtype turned into infinities, and that dtype."""
    stored = getattr(torch, plan.hf[part.step.hf_names[0]].dtype)
    if torch.finfo(stored).max <= torch.finfo(part.data.dtype).max or is_finite(part.data):
        return []
    found = []
    for name, shape in zip(part.step.hf_names, part.step.rule.hf_shapes(plan.dims), strict=True):
        whole = open_tensor(plan.hf[name])[0 : shape[0]]
        if is_finite(whole) and not is_finite(whole.to(part.data.dtype)):
            found.append((f"hf {name}", str(part.data.dtype).removeprefix("torch.")))
    return found


def parts_of(tensors: Iterable[ShardedTensor], steps: Sequence[Step]) -> Iterator[Part]:
    """This rank's parts of all weights, in the order of `tensors` (`mcore.backend.load.model_tensors`).

    Where several steps use one tensor of megatron's, the part comes once for each.
    """
    by_place: dict[tuple[str, tuple[int, ...]], list[Step]] = {}
    for step in steps:
        by_place.setdefault((step.mcore_key, step.index), []).append(step)
    num_stacked = {step.mcore_key: len(step.stacked) for step in steps}
    for tensor in tensors:
        sizes, depth = stacked_sizes(tensor), num_stacked[tensor.key]
        box = [slice(first, first + size) for first, size in zip(tensor.global_offset, sizes, strict=True)]
        whole = tensor.data.view(sizes)
        for places in product(*(range(size) for size in sizes[:depth])):
            index = tuple(axis.start + place for axis, place in zip(box, places, strict=False))
            for step in by_place[tensor.key, index]:
                yield Part(step, box[depth], tuple(box[depth + 1 :]), whole[places], is_main_replica(tensor.replica_id))


@dataclass(frozen=True, slots=True)
class _Columns:
    """Some columns of a tensor, cut out of the rows that are asked for."""

    rows: Any
    columns: tuple[slice, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        cut: Tensor = self.rows[rows][(slice(None), *self.columns)]
        return cut
