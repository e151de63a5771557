"""Losses of chosen tokens in chunks against megatron-core's own losses of all tokens.

B batch, S sequence, T chosen tokens, V vocabulary
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcore.backend.cross_entropy import ChosenTokenLosses
from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from tests.tiny_models import PADDED_VOCAB_SIZE, SIZES, fill, mcore_tensors, tiny_hf_model

pytestmark = pytest.mark.usefixtures("alone")

IDS_BS = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
LABELS_BS = IDS_BS.roll(-1, dims=1)
POSITIONS_BS = torch.arange(40).expand(2, -1)
PLACES_T = torch.randperm(80, generator=torch.Generator().manual_seed(2))[:29].sort().values
MODELS = ("llama", "qwen3_tied", "gemma2")
"""An output layer of its own, a tied one, and one whose logits are capped."""


def model_of(name: str, dtype: torch.dtype = torch.float32) -> GPTModel:
    hf, config = tiny_hf_model(name)
    model = build_model(
        config, padded_vocab_size=PADDED_VOCAB_SIZE, layout=Layout(), params_dtype=dtype, backend="torch"
    )
    tensors = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    fill(model, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    return model.train()


def chosen(of_all_BS: Tensor, places_T: Tensor = PLACES_T) -> Tensor:
    return of_all_BS.t().flatten()[places_T]


def plain(model: GPTModel) -> Tensor:
    losses_T = chosen(model(IDS_BS, POSITIONS_BS, None, labels=LABELS_BS).float())
    (0.5 * losses_T.sum()).backward()
    return losses_T.detach()


def chunked(model: GPTModel, chunk_tokens: int | None, places_T: Tensor = PLACES_T) -> Tensor:
    ChosenTokenLosses(model, chunk_tokens).places_T = places_T
    losses_1T = model(IDS_BS, POSITIONS_BS, None, labels=chosen(LABELS_BS, places_T)[None])
    (0.5 * losses_1T.sum()).backward()
    return losses_1T[0].detach()


def relative_error(expected: Tensor, found: Tensor) -> float:
    return ((expected - found).abs().max() / expected.std()).item()


def gradients(model: GPTModel) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk_tokens", [1, 7, 29, 1000, None])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_all_logits_at_once(name: str, chunk_tokens: int | None) -> None:
    one, other = model_of(name), model_of(name)
    expected_T, found_T = plain(one), chunked(other, chunk_tokens)
    torch.testing.assert_close(found_T, expected_T, atol=1e-6, rtol=1e-6)
    for key, gradient in gradients(one).items():
        assert relative_error(gradient, gradients(other)[key]) < 1e-4, key
    assert gradients(one)["decoder.final_layernorm.weight"].abs().max() > 1e-2
    assert other.shared_embedding_or_output_weight().grad[SIZES["vocab_size"] :].abs().max() == 0


@pytest.mark.parametrize("chunk_tokens", [7, None])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_with_a_weight_a_token(name: str, chunk_tokens: int | None) -> None:
    weights_T = torch.rand(len(PLACES_T), generator=torch.Generator().manual_seed(3)) * 2
    one, other = model_of(name), model_of(name)
    expected_T = weights_T * chosen(one(IDS_BS, POSITIONS_BS, None, labels=LABELS_BS).float())
    (0.5 * expected_T.sum()).backward()
    losses = ChosenTokenLosses(other, chunk_tokens)
    losses.places_T, losses.weights_1T = PLACES_T, weights_T[None]
    found_1T = other(IDS_BS, POSITIONS_BS, None, labels=chosen(LABELS_BS)[None])
    (0.5 * found_1T.sum()).backward()
    torch.testing.assert_close(found_1T[0].detach(), expected_T.detach(), atol=2e-6, rtol=1e-6)
    for key, gradient in gradients(one).items():
        assert relative_error(gradient, gradients(other)[key]) < 1e-4, key


def test_weights_of_one_change_no_bit() -> None:
    one, other = model_of("llama"), model_of("llama")
    plain_T = chunked(one, 7)
    losses = ChosenTokenLosses(other, 7)
    losses.places_T, losses.weights_1T = PLACES_T, torch.ones(1, len(PLACES_T))
    found_1T = other(IDS_BS, POSITIONS_BS, None, labels=chosen(LABELS_BS)[None])
    (0.5 * found_1T.sum()).backward()
    assert torch.equal(found_1T[0].detach(), plain_T)
    assert all(torch.equal(gradient, gradients(other)[key]) for key, gradient in gradients(one).items())


@pytest.mark.parametrize("name", MODELS)
def test_bf16_gradients_are_as_exact_in_chunks_as_without(name: str) -> None:
    exact, one, other = model_of(name), model_of(name, torch.bfloat16), model_of(name, torch.bfloat16)
    plain(exact)
    plain(one)
    chunked(other, 7)
    for key, gradient in gradients(exact).items():
        noise, error = ((gradients(model)[key].float() - gradient).norm() for model in (one, other))
        assert 0 < error < 1.25 * noise + 1e-3 * gradient.norm(), key


@pytest.mark.parametrize("name", MODELS)
def test_validation_gives_the_same_losses_and_keeps_nothing(name: str) -> None:
    expected_T = plain(model_of(name))
    model = model_of(name)
    ChosenTokenLosses(model, 7).places_T = PLACES_T
    with torch.no_grad():
        losses_1T = model(IDS_BS, POSITIONS_BS, None, labels=chosen(LABELS_BS)[None])
    torch.testing.assert_close(losses_1T[0], expected_T, atol=1e-6, rtol=1e-6)
    assert losses_1T.grad_fn is None


def test_a_model_without_labels_gives_logits_as_before() -> None:
    model, other = model_of("llama"), model_of("llama")
    ChosenTokenLosses(other, 7)
    assert torch.equal(other(IDS_BS, POSITIONS_BS, None), model(IDS_BS, POSITIONS_BS, None))


def test_a_micro_batch_without_trained_tokens_has_gradients_of_zero() -> None:
    model = model_of("llama")
    assert chunked(model, 7, PLACES_T[:0]).shape == (0,)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients(model).values())


def test_a_frozen_output_layer_gets_no_gradient_and_the_rest_all_of_it() -> None:
    one, other = model_of("llama"), model_of("llama")
    plain(one)
    other.output_layer.weight.requires_grad_(False)
    chunked(other, 7)
    assert other.output_layer.weight.grad is None
    key = "embedding.word_embeddings.weight"
    assert relative_error(gradients(one)[key], gradients(other)[key]) < 1e-4


def test_losses_that_do_not_count_alike_are_refused() -> None:
    model = model_of("llama")
    ChosenTokenLosses(model, 7).places_T = PLACES_T
    losses_1T = model(IDS_BS, POSITIONS_BS, None, labels=chosen(LABELS_BS)[None])
    with pytest.raises(RuntimeError, match="must count alike"):
        (losses_1T * torch.arange(29)).sum().backward()


class Sizes(TorchDispatchMode):
    """Rows of the largest tensor of logits that any operation makes; the output weight, turned, is none."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == PADDED_VOCAB_SIZE:
                rows = tensor.numel() // PADDED_VOCAB_SIZE
                self.rows = max(self.rows, 0 if rows == SIZES["hidden_size"] else rows)
        return result


@pytest.mark.parametrize(("chunk_tokens", "rows"), [(7, 7), (None, 29)])
def test_no_more_logits_than_a_chunks_are_ever_held(chunk_tokens: int | None, rows: int) -> None:
    model = model_of("llama")
    with Sizes() as sizes:
        chunked(model, chunk_tokens)
    assert sizes.rows == rows
