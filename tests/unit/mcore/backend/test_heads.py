"""Classifiers and reward models against transformers: logits at every position, and the one of the whole sequence.

B batch, S sequence, L labels
"""

from __future__ import annotations

import pytest
import torch

from mcore.backend.heads import last_token_logits
from mcore.errors import ConfigError
from tests.tiny_classifiers import CLASSIFIERS, PAD
from tests.tiny_models import tiny_hf_model
from tests.unit.mcore.backend.test_model import (
    IDS_BS,
    MAX_RELATIVE_ERROR,
    POSITIONS_BS,
    mcore_model,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("alone")

PADDED_BS = torch.where((torch.arange(40) >= 30) & (torch.arange(2)[:, None] == 1), PAD, IDS_BS.clamp(max=PAD - 1))
"""The second row ends with ten tokens of padding; a model with causal attention computes the others as without."""


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_equal_those_of_the_reference_model(name: str) -> None:
    hf, config = tiny_hf_model(name)
    seen: list[torch.Tensor] = []
    hf.score.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    pooled_BL = hf(PADDED_BS).logits
    logits_BSL = mcore_model(hf, config).eval()(PADDED_BS, POSITIONS_BS, None)
    assert logits_BSL.shape == (2, 40, hf.config.num_labels)
    assert relative_error(seen[0], logits_BSL) < MAX_RELATIVE_ERROR
    assert (pooled_BL - last_token_logits(logits_BSL, PADDED_BS, PAD)).abs().max() / seen[0].std() < MAX_RELATIVE_ERROR


@torch.no_grad()
@pytest.mark.parametrize("pad_token_id", [None, 7])
def test_the_answer_is_taken_where_transformers_takes_it(pad_token_id: int | None) -> None:
    hf, _ = tiny_hf_model("llama_classifier")
    hf.config.pad_token_id = pad_token_id
    rows = [[3, 4, 5, 6], [3, 4, 7, 7], [7, 7, 3, 4], [3, 7, 4, 7], [7, 7, 7, 7]]
    for row in rows if pad_token_id is None else [rows]:  # transformers takes no batch without a padding token
        ids_BS = torch.tensor(row).view(-1, 4)
        seen: list[torch.Tensor] = []
        handle = hf.score.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append(output))
        pooled_BL = hf(ids_BS).logits
        handle.remove()
        assert torch.equal(pooled_BL, last_token_logits(seen[0], ids_BS, pad_token_id))


@torch.no_grad()
def test_a_wrong_head_is_seen() -> None:
    hf, config = tiny_hf_model("llama_classifier")
    model = mcore_model(hf, config).eval()
    right = model(IDS_BS, POSITIONS_BS, None)
    model.output_layer.weight.copy_(model.output_layer.weight.roll(1, 0))
    assert relative_error(right, model(IDS_BS, POSITIONS_BS, None)) > 1e-2


def test_gradients_equal_those_of_the_reference_model() -> None:
    hf, config = tiny_hf_model("qwen2_reward")
    model = mcore_model(hf, config)
    last_token_logits(model(PADDED_BS, POSITIONS_BS, None), PADDED_BS, PAD).sum().backward()
    hf(PADDED_BS).logits.sum().backward()
    assert relative_error(hf.score.weight.grad, model.output_layer.weight.grad) < 1e-4
    expected, found = hf.model.norm.weight.grad, model.decoder.final_layernorm.weight.grad
    assert relative_error(expected, found) < 1e-4


def test_losses_of_a_language_model_are_refused() -> None:
    hf, config = tiny_hf_model("qwen3_classifier")
    with pytest.raises(ConfigError, match="a sequence classifier has no language model loss"):
        mcore_model(hf, config)(IDS_BS, POSITIONS_BS, None, labels=IDS_BS)
