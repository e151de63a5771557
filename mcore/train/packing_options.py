"""Where samples can't share rows. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.schema.packing import PackingFields
from mcore.backend.rope_scaling import DEPENDS_ON_LENGTH, rope_parameters
from mcore.errors import Problem

LENGTHS = ("original_max_position_embeddings", "max_position_embeddings")
"""Fields that say at which length such frequencies change, of the rope or of the model."""


def packing_problems(fields: PackingFields, hf_config: Mapping[str, Any], max_length: int) -> list[Problem]:
    """What keeps a run from packing: frequencies that change with a sample's length, where samples are that long.

    All samples of a row are turned by the frequencies of its longest, so that others would depend on it.

    Args:
        fields: The run's `train` group.
        hf_config: Mapping of the model's `config.json`.
        max_length: Tokens of the longest sample that the run's data may have.

    Raises:
        ConfigError: The model's rope can't be read.
    """
    ropes = rope_parameters(hf_config).values()
    kinds = {rope["rope_type"] for rope in ropes} & set(DEPENDS_ON_LENGTH)
    known = [place[name] for place in (hf_config, *ropes) for name in LENGTHS if place.get(name) is not None]
    if not fields.packing or not kinds or max_length <= min(known, default=0):
        return []
    text = f"false, as rope type {min(kinds)} turns samples of more than {min(known, default=0)} tokens in another way"
    return [Problem("train.packing", text, "true", f"Or set data.max_length: {min(known, default=0)} or less.")]
