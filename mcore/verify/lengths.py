"""What a model does only on sequences longer than the prompts: nothing is proven of it but what its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.backend.rope_scaling import DEPENDS_ON_LENGTH, rope_parameters
from mcore.bridge.families import family_of_config


def unreached_lengths(config: Mapping[str, Any], num_tokens: int) -> tuple[str, ...]:
    """Windows that hold the longest prompt whole, rotary frequencies that only longer sequences have, growing queries.

    Args:
        config: Mapping of a `config.json`.
        num_tokens: Tokens of the longest prompt.

    Raises:
        ConfigError: The model can't be built.
    """
    features = family_of_config(config).features(config)
    windows = sorted({window for window in features.windows if window})
    found = [f"the window of {window} tokens" for window in windows if window >= num_tokens]
    for rope in rope_parameters(config).values():
        if rope["rope_type"] in DEPENDS_ON_LENGTH:
            # As transformers: the key beside the rope settings counts more than the one in them.
            length = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
            length = length or config.get("max_position_embeddings")
            if isinstance(length, int) and length >= num_tokens:
                found.append(f"the {rope['rope_type']} frequencies beyond {length} tokens")
    if (scale := features.query_scale) is not None and scale.length >= num_tokens:
        found.append(f"queries that grow beyond {scale.length} tokens")
    return tuple(dict.fromkeys(found))
