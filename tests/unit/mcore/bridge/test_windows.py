"""Windows of each family are those of transformers' masks for the same config."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import create_sliding_window_causal_mask

from mcore.bridge.families import family_of_config
from mcore.errors import ConfigError
from tests.tiny_dense import DENSE
from tests.tiny_models import MODELS, SIZES, tiny_hf_model
from tests.tiny_normed import NORMED

NUM_LAYERS = SIZES["num_hidden_layers"]
FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of(name, **change):
    config = tiny_hf_model(name)[1] | change
    return family_of_config(config).features(config).windows


def refusals(name, **change):
    with pytest.raises(ConfigError) as caught:
        windows_of(name, **change)
    return {problem.subject for problem in caught.value.problems}


@pytest.mark.parametrize("name", [*MODELS, *DENSE, *NORMED])
def test_windows_are_those_of_transformers(name):
    model, config = tiny_hf_model(name)
    windows = family_of_config(config).features(config).windows or (None,) * NUM_LAYERS
    window = getattr(model.config, "sliding_window", None)
    default = [SLIDING if window is not None else FULL] * NUM_LAYERS
    types = getattr(model.config, "layer_types", None) or default
    assert windows == tuple(window if kind == SLIDING else None for kind in types)


def test_these_models_have_all_kinds_of_windows():
    """Else the test above would not see one taken for another."""
    assert windows_of("mistral") == (7,) * 4
    assert windows_of("mistral_full") == ()
    assert windows_of("ministral") == (7, None, 7, None)
    assert windows_of("qwen2") == ()
    assert windows_of("qwen2_window") == (None, None, None, 7)
    assert windows_of("qwen3_window") == (None, 5, 5, None)
    assert windows_of("phi3") == (9,) * 4


def test_a_window_counts_the_token_itself():
    """What `Features.windows` says of a window of 3 is what transformers' mask does."""
    config = tiny_hf_model("mistral")[0].config
    config.sliding_window, config._attn_implementation = 3, "eager"
    mask = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 6, 4),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(6)[None],
    )
    assert (mask[0, 0] == 0).sum(-1).tolist() == [1, 2, 3, 3, 3, 3]


def test_switched_off_windows_are_none():
    assert windows_of("qwen2", use_sliding_window=False, sliding_window=4096, layer_types=None) == ()
    assert windows_of("qwen2", use_sliding_window=None, sliding_window=4096, layer_types=[]) == ()


def test_missing_keys_mean_what_transformers_takes():
    config = {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 2}
    assert family_of_config(config).features(config).windows == (4096, 4096)
    config = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 30, "use_sliding_window": True}
    assert family_of_config(config).features(config).windows == (None,) * 28 + (4096,) * 2
    config = {"architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 2}
    assert family_of_config(config).features(config).windows == ()


def test_layer_types_that_a_class_does_not_read_are_refused():
    types = {"layer_types": [SLIDING, FULL] * 2}
    assert refusals("mistral", **types) == {"config.json: layer_types"}
    assert refusals("phi3", **types) == {"config.json: layer_types"}
    assert refusals("llama", **types) == {"config.json: layer_types"}
    assert windows_of("mistral", layer_types=[SLIDING] * 4) == (7,) * 4


def test_layers_that_slide_without_a_window_are_refused():
    assert refusals("qwen2", layer_types=[SLIDING] * 4) == {"config.json: sliding_window, use_sliding_window"}
    assert refusals("ministral", sliding_window=None) == {"config.json: sliding_window, use_sliding_window"}


def test_wrong_types_and_numbers_are_refused_together():
    assert refusals("ministral", sliding_window=0, layer_types=["chunked_attention"]) == {
        "config.json: sliding_window",
        "config.json: layer_types",
    }
    assert refusals("mistral", sliding_window="7") == {"config.json: sliding_window"}
