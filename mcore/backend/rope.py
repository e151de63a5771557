"""Rotary frequencies, computed by the module that transformers' own model of the config uses.

Scalings of the rotary embedding differ in many small things: what a missing field means, which part of a head turns,
where a factor on cos and sin comes from, at which length the frequencies change. So nothing is computed here: a fresh
module of the reference model is asked what it would use for a sequence of a given length.

Source: transformers 5.19, `modeling_rope_utils.py` and the `*RotaryEmbedding` of each `modeling_*.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcore.backend.rope_scaling import DEPENDS_ON_LENGTH, rope_parameters
from mcore.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class RopeTable:
    """What turns queries and keys of one sequence."""

    inverse_frequencies: Tensor
    """`[turned part of a head / 2]`, fp32."""
    attention_factor: float
    """Factor on cos and sin."""


class ReferenceRope:
    """The rotary embedding of transformers' model of a config: one for all layers, or one for each layer type."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        """Build it once, so that a config that transformers refuses is found before a model is built.

        Args:
            hf_config: Mapping of the model's `config.json`.

        Raises:
            ConfigError: There is no such rope type, or transformers takes the config for invalid.
        """
        self._kinds = {name: rope["rope_type"] for name, rope in rope_parameters(hf_config).items()}
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        try:
            # A config class moves old fields to new places inside of the mappings that it is given.
            self._config = AutoConfig.for_model(**copy.deepcopy(dict(hf_config))).get_text_config()
            # Old files may have the ropes of layer types in fields of their own: the config class gathers them.
            ropes = getattr(self._config, "rope_parameters", None) or {}
            if ropes and all(isinstance(rope, Mapping) for rope in ropes.values()):
                used = set(self._config.layer_types)
                self._kinds = {name: rope["rope_type"] for name, rope in ropes.items() if name in used}
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]
            self._class = _rotary_class(model_class)
            self.tables(1)
        except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as exc:
            raise ConfigError(
                "the model's config is not valid", [Problem("config.json", f"what transformers takes: {exc}")]
            ) from exc

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Keys of the ropes, in the order of `tables`; a single empty one if all layers share theirs."""
        return tuple(self._kinds)

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies differ from one sequence length to another."""
        return any(kind in DEPENDS_ON_LENGTH for kind in self._kinds.values())

    def tables(self, seq_len: int) -> tuple[RopeTable, ...]:
        """What each layer type uses for a sequence of `seq_len` tokens that nothing was computed before."""
        with torch.device("cpu"):  # whatever device a plan on the meta device has made the default
            module = self._class(copy.deepcopy(self._config))
            last_position_BS = torch.tensor([[seq_len - 1]])
            tables = []
            for name in self._kinds:
                prefix = f"{name}_" if name else ""
                # Its forward is what exchanges the frequencies where they depend on the length.
                module(torch.empty(0), last_position_BS, *([name] if name else []))
                frequencies = getattr(module, f"{prefix}inv_freq")
                tables.append(RopeTable(frequencies.float(), float(getattr(module, f"{prefix}attention_scaling"))))
        return tuple(tables)


def _rotary_class(model_class: type[Any]) -> type[Any]:
    module = sys.modules[model_class.__module__]
    found = [
        value
        for name, value in vars(module).items()
        if name.endswith("RotaryEmbedding") and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} has {len(found)} rotary embeddings, not one")
    rotary_class: type[Any] = found[0]
    return rotary_class
