"""The plan of a conversion: table x Hugging Face headers x megatron's checkpoint, compared before data is read.

Every tensor of either side is claimed by exactly one row of the family's table, or named in it as left out. Anything
else ends in one error that lists all of it. No torch here.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mcore.bridge.dims import ModelDims, Shape
from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.hf_quantised import Quantisation
from mcore.bridge.hf_tensors import HfTensor, activation_scales, find_hf_tensors, scale_problems
from mcore.bridge.rules import LAYER, MTP, Family, Rule
from mcore.errors import Problem, WeightPlanError

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
"""torch's names of the dtypes that weights may have."""

STALE_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rotary_emb_local.inv_freq",
    "masked_bias",
)
"""Endings of the names of what older versions of transformers saved although it follows from the config."""
LAYER_NUMBER = re.compile(r"\blayers\.(\d{1,9})\.")

NO_WEIGHTS = ("optimizer.*", "chained_*.optimizer.*", "rng_state*", "rerun_state_machine_state*")
"""Tensors of a training checkpoint that are no weights and are left out on export."""


class Described(Protocol):
    """A tensor of either side, before its data is read."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> str:
        """Name of the dtype in torch."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the table at one layer, of one expert, with real names.

    `index` is the place on the axes that megatron stacks layers and experts on, and `stacked` their sizes; both are
    empty where a parameter has a tensor of its own.
    """

    rule: Rule
    mcore_key: str
    hf_names: tuple[str, ...]
    index: tuple[int, ...] = ()
    stacked: Shape = ()

    @property
    def mcore_name(self) -> str:
        """Megatron's tensor and the place in it, as a message names it."""
        return f"{self.mcore_key}{list(self.index)}" if self.index else self.mcore_key


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion does, in order.

    `equal_hf` holds pairs of Hugging Face tensors that must be equal bit for bit: a tied model's output layer that is
    stored all the same, and the embedding that stands for it. `ignored_hf` are the names left out on purpose.
    """

    steps: tuple[Step, ...]
    dims: ModelDims
    hf: Mapping[str, HfTensor] = field(default_factory=dict)
    equal_hf: tuple[tuple[str, str], ...] = ()
    ignored_hf: tuple[str, ...] = ()


def steps_of(family: Family, dims: ModelDims) -> tuple[Step, ...]:
    """All steps of a model, layer by layer, so that what stands together in a model is written together."""
    layered = [rule.per_layer or rule.per_mtp_layer for rule in family.rules]
    first = layered.index(True)
    steps: list[Step] = []
    for number, rule in enumerate(family.rules):
        if number == first:
            steps += _layer_steps(family, dims)
        if not layered[number] and rule.applies(dims):
            steps += _steps(rule, dims)
    return tuple(steps)


def _layer_steps(family: Family, dims: ModelDims) -> Iterator[Step]:
    for layer in range(dims.num_layers + dims.num_mtp_layers):
        is_mtp = layer >= dims.num_layers
        for rule in family.rules:
            if (rule.per_mtp_layer if is_mtp else rule.per_layer) and rule.applies(dims, layer):
                yield from _steps(rule, dims, layer)


def _steps(rule: Rule, dims: ModelDims, layer: int | None = None) -> Iterator[Step]:
    key = rule.mcore
    index: tuple[int, ...] = ()
    stacked: Shape = ()
    if layer is not None and rule.per_mtp_layer:
        key = key.replace(MTP, str(layer - dims.num_layers))
    elif layer is not None and dims.has_stacked_layers:
        key, index, stacked = key.replace(f"{LAYER}.", ""), (layer,), (dims.num_layers,)
    elif layer is not None:
        key = key.replace(LAYER, str(layer))
    if not rule.per_expert:
        yield Step(rule, key, rule.hf_names(layer or 0), index, stacked)
        return
    num_experts = dims.size("experts")
    for expert in range(num_experts):
        yield Step(rule, key, rule.hf_names(layer or 0, expert), (*index, expert), (*stacked, num_experts))


def global_shape(step: Step, dims: ModelDims) -> Shape:
    """Shape of megatron's tensor in a checkpoint, all layers and experts stacked."""
    return (*step.stacked, *step.rule.mcore_shape(dims))


def mcore_shapes_of(family: Family, dims: ModelDims) -> dict[str, Shape]:
    """Shapes of all of megatron's tensors by key, as the table has them."""
    return {step.mcore_key: global_shape(step, dims) for step in steps_of(family, dims)}


def plan_convert(
    family: Family,
    dims: ModelDims,
    *,
    hf: Mapping[str, StoredTensor],
    mcore_shapes: Mapping[str, Shape],
    quantisation: Quantisation | None = None,
    are_files_whole: bool = True,
) -> Plan:
    """The plan from Hugging Face to megatron.

    Args:
        family: The model's family.
        dims: Its sizes.
        hf: Tensors of the safetensors' headers, by name.
        mcore_shapes: Global shapes that megatron's model loads, by key.
        quantisation: How quantised weights are stored, as the config says.
        are_files_whole: Whether `hf` is all that the files should hold; if not, nothing is said of missing tensors.

    Raises:
        WeightPlanError: Lists everything missing, unclaimed, doubly claimed, misshapen or of a wrong dtype.
    """
    steps = steps_of(family, dims)
    problems = _claimed_twice(steps)
    wanted = {
        name: shape for step in steps for name, shape in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True)
    }
    found = find_hf_tensors(wanted, hf, quantisation)
    ignored = ignored_names(family, dims, hf) | activation_scales(found, hf, quantisation)
    tied = tied_copies(family, dims, hf)
    claimed = {name for tensor in found.values() for name, _ in tensor.claims}
    explained = claimed | ignored | {copy for copy, _ in tied}
    problems += [
        Problem(f"hf {name}", f"a tensor {_text(shape)}", "none", "Not all weights are there, or config.json is wrong.")
        for name, shape in sorted(wanted.items())
        if name not in found and are_files_whole
    ]
    problems += [
        Problem(f"hf {name}", f"a row of the {family.name} table", f"none for this tensor {_text(hf[name].shape)}")
        for name in sorted(hf.keys() - explained)
    ]
    problems += [
        Problem(f"hf {name}", _text(shape), _text(found[name].shape), "config.json and weights disagree.")
        for name, shape in sorted(wanted.items())
        if name in found and tuple(found[name].shape) != shape
    ]
    problems += _partly_claimed(found, hf)
    problems += scale_problems(found, quantisation)
    problems += _dtype_problems("hf", {name: tensor.dtype for name, tensor in found.items()})
    problems += _mixed_dtypes(steps, found)
    problems += mcore_problems(family.name, dims, steps, mcore_shapes)
    if problems:
        raise WeightPlanError(f"the weights do not fit the {family.name} table", problems)
    return Plan(steps, dims, found, tied, tuple(sorted(ignored)))


def plan_export(family: Family, dims: ModelDims, *, mcore: Mapping[str, Described]) -> Plan:
    """The plan from a megatron checkpoint to Hugging Face.

    Args:
        family: The model's family.
        dims: Its sizes, with the checkpoint's own padded vocabulary.
        mcore: The checkpoint's tensors by key. Optimizer and random number state are left out.

    Raises:
        WeightPlanError: As `plan_convert`.
    """
    weights = {
        key: tensor for key, tensor in mcore.items() if not any(fnmatch.fnmatchcase(key, no) for no in NO_WEIGHTS)
    }
    steps = steps_of(family, dims)
    problems = _claimed_twice(steps)
    problems += mcore_problems(family.name, dims, steps, {key: tuple(tensor.shape) for key, tensor in weights.items()})
    problems += _dtype_problems("mcore", {key: tensor.dtype for key, tensor in weights.items()})
    if dims.padded_vocab < dims.vocab:
        problems.append(
            Problem("mcore vocabulary", f"at least config.json's vocab_size {dims.vocab}", str(dims.padded_vocab))
        )
    if problems:
        raise WeightPlanError(f"the checkpoint does not fit the {family.name} table", problems)
    return Plan((*steps, *_copy_steps(family, dims, steps)), dims)


def ignored_names(family: Family, dims: ModelDims, stored: Iterable[str]) -> set[str]:
    """Stored Hugging Face tensors that are left out: those the table names, at every layer, and old buffers."""
    layers = range(dims.num_layers + dims.num_mtp_layers)
    named = {pattern.replace(LAYER, str(layer)) for pattern in family.ignored_hf for layer in layers}
    return {name for name in stored if name in named or _is_stale_buffer(name, layers)}


def _is_stale_buffer(name: str, layers: Container[int]) -> bool:
    layer = LAYER_NUMBER.search(name)
    ending = name.endswith(tuple(f".{buffer}" for buffer in STALE_BUFFERS))
    return ending and (layer is None or int(layer[1]) in layers)


def tied_copies(family: Family, dims: ModelDims, stored: Container[str]) -> tuple[tuple[str, str], ...]:
    """Stored Hugging Face tensors that another stored one stands for, each with that other."""
    claimed = {name for step in steps_of(family, dims) for name in step.hf_names if "[" not in name}
    pairs = dict.fromkeys(
        (copy.replace(LAYER, str(layer)), original)
        for copy, original in family.tied_hf
        for layer in range(dims.num_layers, dims.num_layers + max(1, dims.num_mtp_layers))
    )
    return tuple((copy, of) for copy, of in pairs if copy in stored and copy not in claimed and of in stored)


def _copy_steps(family: Family, dims: ModelDims, steps: Sequence[Step]) -> Iterator[Step]:
    """What files repeat in every layer for further tokens, written from the same tensor of megatron's as the first."""
    copies = [(copy, original) for copy, original in family.tied_hf if LAYER in copy]
    for layer in range(dims.num_layers, dims.num_layers + dims.num_mtp_layers):
        for copy, original in copies:
            of_original = (step for step in steps if step.hf_names == (original,))
            yield from (replace(step, hf_names=(copy.replace(LAYER, str(layer)),)) for step in of_original)


def mcore_problems(
    family_name: str, dims: ModelDims, steps: Sequence[Step], found: Mapping[str, Shape]
) -> list[Problem]:
    """What the table and a checkpoint's or a model's global shapes, by key, say of each other that does not fit."""
    wanted = {step.mcore_key: global_shape(step, dims) for step in steps}
    problems = [
        Problem(f"mcore {key}", f"a tensor {_text(shape)}", "none")
        for key, shape in sorted(wanted.items())
        if key not in found
    ]
    problems += [
        Problem(f"mcore {key}", f"a row of the {family_name} table", f"none for this tensor {_text(found[key])}")
        for key in sorted(found.keys() - wanted.keys())
    ]
    problems += [
        Problem(f"mcore {key}", _text(shape), _text(found[key]))
        for key, shape in sorted(wanted.items())
        if key in found and tuple(found[key]) != shape
    ]
    return problems


def _claimed_twice(steps: Sequence[Step]) -> list[Problem]:
    claims = Counter(f"hf {name}" for step in steps for name in step.hf_names)
    claims += Counter(f"mcore {step.mcore_name}" for step in steps)
    return [Problem(name, "one row", f"{count} rows that claim it") for name, count in claims.items() if count > 1]


def _partly_claimed(found: Mapping[str, HfTensor], stored: Mapping[str, StoredTensor]) -> list[Problem]:
    """Stored tensors of which the table's rows take other bytes than all of them, each once."""
    claimed: Counter[str] = Counter()
    for tensor in found.values():
        for name, num_bytes in tensor.claims:
            claimed[name] += num_bytes
    return [
        Problem(f"hf {name}", f"rows for all {stored[name].num_bytes} bytes", f"rows for {num_bytes}")
        for name, num_bytes in sorted(claimed.items())
        if num_bytes != stored[name].num_bytes
    ]


def _dtype_problems(side: str, dtypes: Mapping[str, str]) -> list[Problem]:
    return [
        Problem(
            f"{side} {name}",
            f"one of {', '.join(WEIGHT_DTYPES)}",
            dtype,
            "It is no weight, or quantised in a way that is not known.",
        )
        for name, dtype in sorted(dtypes.items())
        if dtype not in WEIGHT_DTYPES
    ]


def _mixed_dtypes(steps: Iterable[Step], hf: Mapping[str, HfTensor]) -> list[Problem]:
    """Megatron's tensor has one dtype, over its parts and over its layers."""
    seen: dict[str, dict[str, str]] = {}
    for step in steps:
        for name in step.hf_names:
            if name in hf:
                seen.setdefault(step.mcore_key, {}).setdefault(hf[name].dtype, name)
    return [
        Problem(
            f"hf tensors of mcore {key}", "one dtype", ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
        )
        for key, found in seen.items()
        if len(found) > 1
    ]


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
