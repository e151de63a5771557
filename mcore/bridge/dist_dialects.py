"""Spellings of megatron-core checkpoints: whichever tool and layer spec wrote one, its weights under our tables' keys.

    what differs         spellings
    prefix               decoder.…, model.decoder.…, module.decoder.…
    layers               stacked on an axis; or a tensor each, decoder.layers.3.…
    experts              stacked on an axis; or a tensor each, mlp.experts.experts.3.linear_fc1.weight
    gate and up          one tensor; or linear_fc1.weight_w (gate) and linear_fc1.weight_v (up)
    norms                of the layer; or of the matrix that Transformer Engine fuses them with: `SAME`

No data is copied: a weight keeps its chunks where they lie, and only their places in the whole are told anew.

Source: megatron-core 0.16.1 and 0.19.2 `models/gpt/gpt_layer_specs.py` (`sharded_state_dict_keys_map`),
`transformer/mlp.py` and `transformer/moe/experts.py` (`singleton_local_shards`).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mcore.bridge.dims import Shape
from mcore.bridge.dist_files import Chunk, DistTensor, read_dist_tensors
from mcore.bridge.plan import NO_WEIGHTS
from mcore.errors import Problem, WeightPlanError

SAME = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
)
"""Ends of names that stand for the same weight in different layer specs."""

EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
GROUPED_MLP = ("*.mlp.experts.weight1", "*.mlp.experts.weight2")
"""The grouped MLP's own parameters, with all experts side by side and transposed. It has always been saved under the
sequential MLP's names instead, so these come from a checkpoint that was not saved by `sharded_state_dict`."""

_PREFIX = re.compile(r"^((model|module)\.)+")
_LAYER = re.compile(r"^decoder\.layers\.((?P<number>\d+)\.)?")
_EXPERT = re.compile(r"\.experts\.experts\.((?P<number>\d+)\.)?")
_HALF = re.compile(r"(?<=\.linear_fc1\.)(weight|bias)_(?P<half>[wv])$")
_HALVES = "wv"
"""Megatron's letters for gate and up."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """A key taken apart: the weight's name without numbers, and the numbers that the key has, None where it has none.

    `half` is 0 for gate, 1 for up, None for both in one tensor.
    """

    name: str
    layer: int | None = None
    expert: int | None = None
    half: int | None = None

    @property
    def has_layers(self) -> bool:
        """Whether every layer of the decoder may have this weight."""
        return self.name.startswith("decoder.layers.")

    @property
    def has_experts(self) -> bool:
        """Whether every expert of a layer has this weight."""
        return _EXPERT.search(self.name) is not None

    def __str__(self) -> str:
        numbers = (("layer", self.layer), ("expert", self.expert), ("half", self.half))
        return " ".join(f"{what} {number}" for what, number in numbers if number is not None)


@dataclass(frozen=True, slots=True)
class _Part:
    """A stored tensor that is all of a weight or some of it."""

    spelling: Spelling
    key: str
    tensor: DistTensor


def read_weights(folder: Path, wanted: Mapping[str, Shape]) -> dict[str, DistTensor]:
    """A checkpoint's weights by our keys; no data is read but a tied output layer's.

    Args:
        folder: The folder of one iteration, with `.metadata` in it.
        wanted: Shapes of the weights that a table or a model has, by key. Only numbers of layers and experts count:
            sizes may differ, which is for the caller to judge. So is a weight that is missing here, and one that is no
            wanted weight: it comes under its own key. Optimizer and random number state are left out.

    Raises:
        CheckpointError: The checkpoint is not complete, or its metadata names anything but plain values.
        WeightPlanError: Parts of a weight are missing or do not fit each other, or the output layer differs from the
            embedding that it is tied to.
    """
    stored = {
        key: tensor
        for key, tensor in read_dist_tensors(folder).items()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in NO_WEIGHTS)
    }
    weights, problems = respell(stored, wanted)
    if EMBEDDING in weights and OUTPUT_LAYER not in wanted:
        problems += _tied_problems(weights.pop(OUTPUT_LAYER, None), weights[EMBEDDING])
    if problems:
        raise WeightPlanError(f"{folder} can't be read as this model", problems)
    return weights


def respell(
    stored: Mapping[str, DistTensor], wanted: Mapping[str, Shape]
) -> tuple[dict[str, DistTensor], list[Problem]]:
    """Stored tensors by the wanted keys; what no wanted key explains stays under its own one.

    Returns:
        The tensors, and problems with those that are put together of several.
    """
    parts: dict[str, list[_Part]] = {}
    for key, tensor in stored.items():
        part = _Part(spelling_of(key), key, tensor)
        parts.setdefault(part.spelling.name, []).append(part)
    weights: dict[str, DistTensor] = {}
    problems: list[Problem] = []
    uses: Counter[str] = Counter()
    for key, shape in wanted.items():
        of_key = _parts_of(key, shape, parts)
        uses.update(part.key for part in of_key)
        if [_PREFIX.sub("", part.key) for part in of_key] == [key]:
            weights[key] = replace(of_key[0].tensor, key=key)
        elif of_key:
            found = list(_disagreements(key, of_key))
            if not found:
                weights[key] = _put_together(key, shape, of_key)
                found = list(_holes(weights[key], shape, of_key))
            problems += found
    left = {_PREFIX.sub("", key): tensor for key, tensor in stored.items() if key not in uses}
    problems += [
        Problem(f"mcore {key}", f"{count} layers", str(stored[key].shape[0]))
        for key, count in uses.items()
        if count > 1 and count != stored[key].shape[0]  # stacked, where we have a tensor for each layer
    ]
    problems += [
        Problem(
            f"mcore {key}",
            "experts one by one, as sharded_state_dict has them",
            "all experts of a layer side by side, as the legacy grouped MLP has them in memory",
            "Save it again with megatron's dist_checkpointing.",
        )
        for key in left
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in GROUPED_MLP)
    ]
    return weights | left, problems


def _tied_problems(output_layer: DistTensor | None, embedding: DistTensor) -> list[Problem]:
    """Findings about the output layer of a model that has none of its own: it may hold a copy of the embedding."""
    if output_layer is None or same_bits(output_layer, embedding):
        return []
    return [
        Problem(
            f"mcore {OUTPUT_LAYER}",
            f"the same bits as {EMBEDDING}, as the embeddings are tied",
            "other ones",
            "Set tie_word_embeddings to false in config.json if the model has an output layer of its own.",
        )
    ]


def spelling_of(key: str) -> Spelling:
    """A key taken apart."""
    numbers: dict[str, int | None] = {}
    name = _PREFIX.sub("", key)
    for what, pattern, plain in (("layer", _LAYER, "decoder.layers."), ("expert", _EXPERT, ".experts.experts.")):
        if (match := pattern.search(name)) and match["number"]:
            numbers[what] = int(match["number"])
            name = pattern.sub(plain, name, count=1)
    if match := _HALF.search(name):
        numbers["half"] = _HALVES.index(match["half"])
        name = name[:-2]
    return Spelling(name, **numbers)


def same_bits(one: DistTensor, other: DistTensor) -> bool:
    """Whether two tensors without layers hold the same bits; some rows of each are in memory at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for window in one.row_windows():
        rows = [tensor.read_rows((), window).contiguous().view(torch.uint8) for tensor in (one, other)]
        if not torch.equal(*rows):
            return False
    return True


def _parts_of(key: str, shape: Shape, parts: Mapping[str, Sequence[_Part]]) -> list[_Part]:
    """Stored tensors that hold something of a wanted weight, by the first of its names that the checkpoint knows."""
    whole = spelling_of(key)
    num_layers = shape[0] if whole.has_layers and whole.layer is None else 0
    num_experts = shape[1 if num_layers else 0] if whole.has_experts else 0
    for name in _names(whole.name):
        found = [
            part
            for part in parts.get(name, ())
            if (
                part.spelling.layer in (whole.layer, *range(num_layers))
                if part.spelling.layer is not None
                else whole.layer is None or whole.layer < part.tensor.shape[0]
            )
            and (part.spelling.expert is None or part.spelling.expert < num_experts)
        ]
        if found:
            return found
    return []


def _names(name: str) -> Iterator[str]:
    """A weight's names: its own one first."""
    yield name
    for same in SAME:
        for one in same:
            if name.endswith("." + one):
                yield from (name.removesuffix(one) + other for other in same if other != one)


def _disagreements(key: str, parts: Sequence[_Part]) -> Iterator[Problem]:
    """What keeps parts from being parts of one tensor."""
    kinds: dict[tuple[object, ...], str] = {}
    for part in parts:
        s = part.spelling
        inner = part.tensor.shape[_num_stacked(s) :]
        kinds.setdefault((s.layer is None, s.expert is None, s.half is None, inner, part.tensor.dtype), part.key)
    if len(kinds) > 1:
        examples = ", ".join(f"{name} {list(kind[3])} {kind[4]}" for kind, name in kinds.items())  # type: ignore[call-overload]
        yield Problem(f"parts of mcore {key}", "one way of naming, one shape and one dtype", examples)


def _put_together(key: str, shape: Shape, parts: Sequence[_Part]) -> DistTensor:
    """One tensor out of parts that agree with each other."""
    whole, first = spelling_of(key), parts[0]
    stacked = list(shape[: _num_stacked(whole)])
    lead = _num_stacked(first.spelling)
    rows, *rest = first.tensor.shape[lead:]
    num_halves = 1 if first.spelling.half is None else 2
    if whole.has_layers and whole.layer is None and first.spelling.layer is None:
        stacked[0] = first.tensor.shape[0]
    if whole.has_experts and first.spelling.expert is None:
        stacked[-1] = first.tensor.shape[lead - 1]
    chunks = [
        placed
        for part in parts
        for chunk in part.tensor.chunks
        if (placed := _place(chunk, part.spelling, whole, first_row=rows * (part.spelling.half or 0))) is not None
    ]
    return DistTensor(key, (*stacked, num_halves * rows, *rest), first.tensor.dtype, tuple(chunks))


def _place(chunk: Chunk, part: Spelling, whole: Spelling, *, first_row: int) -> Chunk | None:
    """A part's chunk as one of the whole tensor; None if the whole has none of its layers."""
    axes = list(zip(chunk.offsets, chunk.sizes, strict=True))
    lead: list[tuple[int, int]] = []
    index = chunk.index
    if whole.has_layers and part.layer is None:
        first, count = axes.pop(0)
        if whole.layer is None:
            lead.append((first, count))
        elif first <= whole.layer < first + count:
            index = (*index, whole.layer - first)
        else:
            return None
    elif whole.has_layers and whole.layer is None:
        assert part.layer is not None
        lead.append((part.layer, 1))
    if whole.has_experts:
        lead.append(axes.pop(0) if part.expert is None else (part.expert, 1))
    (row, num_rows), *rest = axes
    offsets, sizes = zip(*lead, (row + first_row, num_rows), *rest, strict=True)
    return replace(chunk, offsets=offsets, sizes=sizes, index=index)


def _holes(tensor: DistTensor, shape: Shape, parts: Sequence[_Part]) -> Iterator[Problem]:
    """Layers, experts and halves that no part holds; or that several do."""
    whole = spelling_of(tensor.key)
    held = [(p.spelling.layer, p.spelling.expert, p.spelling.half) for p in parts]
    one = parts[0].spelling
    layers = [None] if one.layer is None else [whole.layer] if whole.layer is not None else range(shape[0])
    experts = [None] if one.expert is None else range(shape[_num_stacked(whole) - 1])
    halves = [None] if one.half is None else range(len(_HALVES))
    wanted = [(layer, expert, half) for layer in layers for expert in experts for half in halves]
    missing = [str(Spelling(whole.name, *place)) for place in wanted if place not in held]
    if missing:
        yield Problem(f"parts of mcore {tensor.key}", f"{len(wanted)} tensors", f"none for {', '.join(missing)}")
    elif sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
        yield Problem(f"parts of mcore {tensor.key}", "each number once", ", ".join(part.key for part in parts))


def _num_stacked(spelling: Spelling) -> int:
    """Leading axes of a tensor with this key that layers and experts are stacked on."""
    return (spelling.has_layers and spelling.layer is None) + (spelling.has_experts and spelling.expert is None)
