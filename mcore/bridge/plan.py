"""The plan of a conversion: table x Hugging Face headers x megatron's checkpoint, compared before data is read.

Every tensor of either side is claimed by exactly one row of the family's table, or named in it as left out. Anything
else ends in one error that lists all of it. No torch here.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mcore.bridge.dims import ModelDims, Shape
from mcore.bridge.rules import LAYER, Family, Rule
from mcore.errors import Problem, WeightPlanError

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
"""torch's names of the dtypes that weights may have."""

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
    """One row of the table at one layer, with real names."""

    rule: Rule
    layer: int | None

    @property
    def mcore_key(self) -> str:
        """Key of megatron's tensor in a checkpoint; the same for all layers."""
        return self.rule.mcore_key

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors."""
        return self.rule.hf_names(self.layer or 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion does, in order.

    `equal_hf` holds pairs of Hugging Face tensors that must be equal bit for bit: a tied model's output layer that is
    stored all the same, and the embedding that stands for it. `ignored_hf` are the names left out on purpose.
    """

    steps: tuple[Step, ...]
    dims: ModelDims
    equal_hf: tuple[tuple[str, str], ...] = ()
    ignored_hf: tuple[str, ...] = ()


def steps_of(family: Family, dims: ModelDims) -> tuple[Step, ...]:
    """All steps of a model, layer by layer, so that what stands together in a model is written together."""
    rules = family.rules_for(dims)
    first_layered = next(i for i, rule in enumerate(rules) if rule.per_layer)
    before = [Step(rule, None) for rule in rules[:first_layered] if not rule.per_layer]
    layers = [Step(rule, layer) for layer in range(dims.num_layers) for rule in rules if rule.per_layer]
    after = [Step(rule, None) for rule in rules[first_layered:] if not rule.per_layer]
    return (*before, *layers, *after)


def global_shape(rule: Rule, dims: ModelDims) -> Shape:
    """Shape of megatron's tensor in a checkpoint, all layers stacked."""
    shape = rule.mcore_shape(dims)
    return (dims.num_layers, *shape) if rule.per_layer else shape


def plan_convert(
    family: Family, dims: ModelDims, *, hf: Mapping[str, Described], mcore_shapes: Mapping[str, Shape]
) -> Plan:
    """The plan from Hugging Face to megatron.

    Args:
        family: The model's family.
        dims: Its sizes.
        hf: Tensors of the safetensors' headers, by name.
        mcore_shapes: Global shapes that megatron's model loads, by key.

    Raises:
        WeightPlanError: Lists everything missing, unclaimed, doubly claimed, misshapen or of a wrong dtype.
    """
    steps = steps_of(family, dims)
    problems = _claimed_twice(steps, family.rules_for(dims))
    wanted = {
        name: shape for step in steps for name, shape in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True)
    }
    ignored = {name for pattern in family.ignored_hf for name in _at_every_layer(pattern, dims)} & hf.keys()
    copy, original = family.tied_hf
    tied = ((copy, original),) if copy in hf and copy not in wanted and original in hf else ()
    explained = wanted.keys() | ignored | {copy for copy, _ in tied}
    problems += [
        Problem(f"hf {name}", f"a tensor {_text(shape)}", "none", "Not all weights are there, or config.json is wrong.")
        for name, shape in sorted(wanted.items())
        if name not in hf
    ]
    problems += [
        Problem(f"hf {name}", f"a row of the {family.name} table", f"none for this tensor {_text(hf[name].shape)}")
        for name in sorted(hf.keys() - explained)
    ]
    problems += [
        Problem(f"hf {name}", _text(shape), _text(hf[name].shape), "config.json and weights disagree.")
        for name, shape in sorted(wanted.items())
        if name in hf and tuple(hf[name].shape) != shape
    ]
    problems += _dtype_problems("hf", {name: hf[name].dtype for name in wanted if name in hf})
    problems += _mixed_dtypes(steps, hf)
    problems += _mcore_problems(family, dims, mcore_shapes)
    if problems:
        raise WeightPlanError(f"the weights do not fit the {family.name} table", problems)
    return Plan(steps, dims, tied, tuple(sorted(ignored)))


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
    problems = _claimed_twice(steps, family.rules_for(dims))
    problems += _mcore_problems(family, dims, {key: tuple(tensor.shape) for key, tensor in weights.items()})
    problems += _dtype_problems("mcore", {key: tensor.dtype for key, tensor in weights.items()})
    if dims.padded_vocab < dims.vocab:
        problems.append(
            Problem("mcore vocabulary", f"at least config.json's vocab_size {dims.vocab}", str(dims.padded_vocab))
        )
    if problems:
        raise WeightPlanError(f"the checkpoint does not fit the {family.name} table", problems)
    return Plan(steps, dims)


def _mcore_problems(family: Family, dims: ModelDims, found: Mapping[str, Shape]) -> list[Problem]:
    wanted = {rule.mcore_key: global_shape(rule, dims) for rule in family.rules_for(dims)}
    problems = [
        Problem(f"mcore {key}", f"a tensor {_text(shape)}", "none")
        for key, shape in sorted(wanted.items())
        if key not in found
    ]
    problems += [
        Problem(f"mcore {key}", f"a row of the {family.name} table", f"none for this tensor {_text(found[key])}")
        for key in sorted(found.keys() - wanted.keys())
    ]
    problems += [
        Problem(f"mcore {key}", _text(shape), _text(found[key]))
        for key, shape in sorted(wanted.items())
        if key in found and tuple(found[key]) != shape
    ]
    return problems


def _claimed_twice(steps: Sequence[Step], rules: Iterable[Rule]) -> list[Problem]:
    claims = Counter(f"hf {name}" for step in steps for name in step.hf_names)
    claims += Counter(f"mcore {rule.mcore_key}" for rule in rules)
    return [Problem(name, "one row", f"{count} rows that claim it") for name, count in claims.items() if count > 1]


def _dtype_problems(side: str, dtypes: Mapping[str, str]) -> list[Problem]:
    return [
        Problem(f"{side} {name}", f"one of {', '.join(WEIGHT_DTYPES)}", dtype, "Quantised weights are not converted.")
        for name, dtype in sorted(dtypes.items())
        if dtype not in WEIGHT_DTYPES
    ]


def _mixed_dtypes(steps: Iterable[Step], hf: Mapping[str, Described]) -> list[Problem]:
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


def _at_every_layer(pattern: str, dims: ModelDims) -> list[str]:
    return [pattern.replace(LAYER, str(layer)) for layer in range(dims.num_layers)] if LAYER in pattern else [pattern]


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
