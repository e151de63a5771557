"""Which scalings of the rotary embedding can be built. No torch here, so that a run can be checked before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.errors import ConfigError, Problem

FREQUENCIES_ONLY = ("default", "linear", "llama3")
"""Rope types that are inverse frequencies and nothing more: no factor on cos and sin, no dependence on length."""


def rope_parameters(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope settings of a `config.json`, wherever its version of transformers put them.

    Raises:
        ConfigError: The scaling needs more than inverse frequencies.
    """
    field = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    parameters: dict[str, Any] = dict(hf_config.get(field) or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in FREQUENCIES_ONLY:
        raise ConfigError(
            "the model's rotary embedding can't be built",
            [
                Problem(
                    f"config.json: {field}.rope_type",
                    f"one of {', '.join(FREQUENCIES_ONLY)}",
                    repr(kind),
                    "Within the original context length the model may be used without scaling: remove the field.",
                )
            ],
        )
    return parameters | {"rope_type": kind}
