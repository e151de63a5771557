"""Which scalings of the rotary embedding can be built. No torch here, so that a run can be checked before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mcore.errors import ConfigError, Problem

NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
        "proportional": (),
    }
)
"""Rope types that can be built, each with the fields that nothing else may stand in for."""
DEPENDS_ON_LENGTH = ("dynamic", "longrope")
"""Rope types whose frequencies are others for a long sequence than for a short one."""
LISTS = ("short_factor", "long_factor")
PHI3_NAMES = ("su", "yarn")
"""What Phi-3 called `longrope` before it had that name."""


def rope_parameters(hf_config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The rope settings of a `config.json`, wherever its version of transformers put them, each with its `rope_type`.

    Returns:
        Settings by layer type (`full_attention`, …); a model with one rope for all layers has it under an empty name.

    Raises:
        ConfigError: A rope type can't be built, or a field that it needs is missing. Lists all of them.
    """
    # transformers prefers the old field where a file has both.
    field = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    settings: Mapping[str, Any] = hf_config.get(field) or {}
    if not isinstance(settings, Mapping):
        raise _refusal([Problem(f"config.json: {field}", "a mapping or null", repr(settings))])
    if settings and all(isinstance(value, Mapping) for value in settings.values()):
        of_types = dict(settings)
    else:
        of_types = {"": settings}
    ropes, problems = {}, []
    for name, of_type in of_types.items():
        kind = _kind(hf_config, of_type)
        ropes[name] = dict(of_type) | {"rope_type": kind}
        problems += _problems(f"config.json: {field}.{name + '.' if name else ''}", ropes[name])
    if problems:
        raise _refusal(problems)
    return ropes


def _kind(hf_config: Mapping[str, Any], rope: Mapping[str, Any]) -> Any:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return "longrope" if hf_config.get("model_type") == "phi3" and kind in PHI3_NAMES else kind


def _problems(place: str, rope: Mapping[str, Any]) -> list[Problem]:
    kind = rope["rope_type"]
    if kind not in NEEDED:
        known = f"one of {', '.join(NEEDED)}"
        remedy = "Within the original context length the model may be used without scaling: remove the field."
        return [Problem(f"{place}rope_type", known, repr(kind), remedy)]
    problems = []
    for key in NEEDED[kind]:
        expected, fits = ("a list of numbers", _is_list) if key in LISTS else ("a positive number", _is_positive)
        if not fits(rope.get(key)):
            problems.append(Problem(f"{place}{key}", f"{expected}, for rope type {kind}", repr(rope.get(key))))
    part = rope.get("partial_rotary_factor")
    if part is not None and not (_is_positive(part) and part <= 1):
        problems.append(Problem(f"{place}partial_rotary_factor", "more than 0, at most 1", repr(part)))
    return problems


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_positive(number) for number in value)


def _refusal(problems: list[Problem]) -> ConfigError:
    return ConfigError("the model's rotary embedding can't be built", problems)
