from __future__ import annotations

import pytest
import torch
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from mcore.backend.query_scale import position_factors
from mcore.bridge.families import family_of_config
from mcore.bridge.features import QueryScale
from mcore.errors import ConfigError
from tests.tiny_models import tiny_hf_model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("beta", "length"), [(0.1, 16), (0.3, 7), (1.5, 16384)])
def test_factors_are_those_of_transformers(beta: float, length: int) -> None:
    found = position_factors(50, QueryScale(beta=beta, length=length), torch.device("cpu"))
    assert torch.equal(found, get_llama_4_attn_scale(torch.arange(50)[None], beta, length)[0, 0, :, 0])
    assert (found[:length] == 1).all() and (length >= 50 or found[length] > 1)


def test_ministral_3_says_how_its_queries_grow() -> None:
    config = tiny_hf_model("ministral3")[1]
    assert family_of_config(config).features(config).query_scale == QueryScale(beta=0.3, length=16)


@pytest.mark.parametrize("missing", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_without_the_numbers_it_is_refused(missing: str) -> None:
    config = tiny_hf_model("ministral3")[1]
    rope = {key: value for key, value in config["rope_parameters"].items() if key != missing}
    with pytest.raises(ConfigError, match=rf"rope_parameters\.{missing}: expected a number, found None"):
        family_of_config(config).features(config | {"rope_parameters": rope})


def test_ministral_3_without_head_dim_is_refused() -> None:
    config = tiny_hf_model("ministral3")[1]
    with pytest.raises(ConfigError, match="head_dim"):
        family_of_config(config).transformer_config(config | {"head_dim": None})
