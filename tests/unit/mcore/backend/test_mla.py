"""Multi-latent attention, grouped experts and their routers against transformers, past the context before YaRN.

V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mcore.backend.mla as mla
from mcore.backend.layout import Layout
from mcore.backend.meta import sharded_shapes
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.plan import mcore_shapes_of
from mcore.errors import ConfigError
from tests.tiny_latent import LATENT_MODELS, YARN
from tests.tiny_models import PADDED_VOCAB_SIZE, tiny_hf_model
from tests.unit.mcore.backend.test_model import (
    MAX_RELATIVE_ERROR,
    VOCAB_SIZE,
    logits_of,
    mcore_model,
    relative_error,
)


@pytest.fixture(autouse=True)
def alone() -> Any:
    with parallel_processes(Layout()):
        yield


def error_of(name: str, change: dict[str, Any] | None = None) -> float:
    hf, config = tiny_hf_model(name)
    logits_BSV, logits_BSP = logits_of(hf, mcore_model(hf, config, build_config=config | (change or {})))
    return relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE])


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_logits_equal_those_of_the_reference_model(name: str) -> None:
    assert error_of(name) < MAX_RELATIVE_ERROR


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.8}}),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}),
        ("deepseek_v3", {"rope_parameters": YARN | {"original_max_position_embeddings": 100}}),
        ("deepseek_v3", {"rope_parameters": YARN | {"beta_fast": 0.5}}),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("deepseek_v3", {"routed_scaling_factor": 1.6}),
        ("deepseek_v3", {"topk_group": 3}),
        ("deepseek_v3", {"n_group": 2}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3_groups", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_group": 3}),
        ("glm4_moe", {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default"}}),
        ("glm4_moe", {"num_experts_per_tok": 3}),
    ],
)
def test_a_wrong_config_is_seen(name: str, change: dict[str, Any]) -> None:
    """The control of the test above."""
    assert error_of(name, change) > 1e-3


def test_latent_norms_have_an_epsilon_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "LATENT_NORM_EPSILON", tiny_hf_model("moonlight")[1]["rms_norm_eps"])
    assert error_of("moonlight") > 1e-3


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_groups", "glm4_moe"])
def test_router_biases_are_nan_until_they_are_loaded_and_change_the_choice_of_experts(name: str) -> None:
    hf, config = tiny_hf_model(name)
    arguments: dict[str, Any] = {"params_dtype": torch.bfloat16, "layout": Layout(), "backend": "torch"}
    empty = build_model(config, padded_vocab_size=PADDED_VOCAB_SIZE, **arguments)
    assert empty.decoder.layers[1].mlp.router.expert_bias.isnan().all()
    assert empty.decoder.layers[1].mlp.router.expert_bias.dtype == torch.float32

    model = mcore_model(hf, config)
    for layer in model.decoder.layers[1:]:
        layer.mlp.router.expert_bias.zero_()
    logits_BSV, logits_BSP = logits_of(hf, model)
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) > 1e-3


def test_frequencies_that_depend_on_the_length_are_refused() -> None:
    change = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    with pytest.raises(ConfigError, match="for latent attention, found dynamic"):
        error_of("deepseek_v3", change)


class TestCheckpoint:
    @pytest.fixture(autouse=True)
    def alone(self) -> None:
        """A meta model starts process groups itself."""

    @pytest.mark.parametrize("name", LATENT_MODELS)
    def test_megatrons_checkpoint_is_what_the_table_says(self, name: str) -> None:
        _, config = tiny_hf_model(name)
        dims = dims_of(config, make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
        content = sharded_shapes(config, padded_vocab_size=PADDED_VOCAB_SIZE, params_dtype=torch.bfloat16)
        shapes = {key: tensor.shape for key, tensor in content.tensors.items()}
        assert shapes == mcore_shapes_of(family_of_config(config), dims)
