"""Dense models with every rope, window and bias against transformers, on sequences longer than both.

V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny_dense import DENSE
from tests.tiny_models import tiny_hf_model
from tests.unit.mcore.backend.test_model import (
    IDS_BS,
    MAX_RELATIVE_ERROR,
    VOCAB_SIZE,
    logits_of,
    mcore_model,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("name", DENSE)
def test_logits_equal_those_of_the_reference_model(name: str) -> None:
    hf, config = tiny_hf_model(name)
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config))
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) < MAX_RELATIVE_ERROR


def rope_without(*fields: str, **change: Any) -> Any:
    """A change of a config's rope that leaves out fields and sets others."""
    return lambda rope: {key: value for key, value in rope.items() if key not in fields} | change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": None}),
        ("ministral", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("ministral3", {"rope_parameters": rope_without(llama_4_scaling_beta=0.29)}),
        ("qwen2_window", {"max_window_layers": 2, "layer_types": None}),
        ("phi3", {"sliding_window": 10}),
        ("mistral_yarn", {"rope_parameters": rope_without("attention_factor")}),
        ("qwen2_yarn", {"rope_parameters": rope_without(beta_slow=1.0)}),
        ("qwen2_yarn", {"rope_parameters": rope_without(original_max_position_embeddings=32)}),
        ("llama_yarn", {"rope_parameters": rope_without("truncate")}),
        ("llama_yarn", {"rope_parameters": rope_without("mscale")}),
        ("llama_dynamic", {"max_position_embeddings": 39}),
        ("phi3_long", {"original_max_position_embeddings": 40}),
        ("phi3_short", {"original_max_position_embeddings": 39}),
        ("phi4_partial", {"rope_parameters": rope_without(rope_theta=9000.0)}),
    ],
)
def test_a_wrong_config_is_seen(name: str, change: dict[str, Any]) -> None:
    """The control of the test above: one token of a window, one field of a rope."""
    hf, config = tiny_hf_model(name)
    if callable(edit := change.get("rope_parameters")):
        change = {"rope_parameters": edit(config["rope_parameters"])}
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config, build_config=config | change))
    assert IDS_BS.shape[1] == 40
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) > 1e-3
