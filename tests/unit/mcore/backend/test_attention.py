"""Our own attention against a plain one. S queries, T keys, B batch, N heads, G groups, D head size."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from mcore.backend.attention import SDPAttention

pytestmark = pytest.mark.usefixtures("alone")
LENGTH = 9


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"attention_dropout": 0.0, "softmax_type": "vanilla", **changes})


def with_sinks(num_heads: int) -> SimpleNamespace:
    return config(softmax_type="learnable", num_attention_heads=num_heads, params_dtype=torch.float32)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention written out, with the mask function that transformers builds its masks from."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    scores_BNST = torch.einsum("sbnd,tbnd->bnst", query, key) * (scale or 1 / math.sqrt(query.shape[-1]))
    if softcap is not None:
        scores_BNST = softcap * torch.tanh(scores_BNST / softcap)
    sees = sliding_window_causal_mask_function(window or 1000)
    sees_ST = sees(0, 0, torch.arange(len(query))[:, None], torch.arange(len(key)))
    weights_BNST = scores_BNST.exp() * sees_ST
    total_BNS1 = weights_BNST.sum(-1, keepdim=True)
    if sinks is not None:
        total_BNS1 = total_BNS1 + sinks.exp()[:, None, None]
    return torch.einsum("bnst,tbnd->sbnd", weights_BNST / total_BNS1, value).flatten(2)


def inputs(groups: int) -> list[Tensor]:
    return [torch.randn(LENGTH, 2, n, 16) for n in (6, groups, groups)]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_attention_is_causal_grouped_scaled_and_capped(groups: int, scale: float | None, softcap: float | None) -> None:
    query, key, value = inputs(groups)
    context = SDPAttention(config(), softmax_scale=scale, softcap=softcap)(query, key, value, None)
    expected = plain(query, key, value, scale=scale, softcap=softcap)
    torch.testing.assert_close(context, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, LENGTH - 1, LENGTH, 100])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_a_window_is_the_token_itself_and_those_just_before(window: int, softcap: float | None) -> None:
    query, key, value = inputs(2)
    attention = SDPAttention(config(), 3, windows=(None, 5, window), softcap=softcap)
    expected = plain(query, key, value, window=window, softcap=softcap)
    torch.testing.assert_close(attention(query, key, value, None), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_each_head_has_a_sink_that_learns(window: int | None) -> None:
    query, key, value = inputs(2)
    attention = SDPAttention(with_sinks(6), windows=(window,))
    sinks = torch.linspace(-2, 3, 6)
    with torch.no_grad():
        attention.softmax_offset.copy_(sinks)
    sinks.requires_grad_()
    found, expected = attention(query, key, value, None), plain(query, key, value, window=window, sinks=sinks)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)

    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(attention.softmax_offset.grad, sinks.grad, atol=1e-5, rtol=1e-4)
    assert sinks.grad.abs().min() > 1e-3


def test_large_scores_and_sinks_do_not_overflow() -> None:
    query, key, value = inputs(2)
    attention = SDPAttention(with_sinks(6))
    with torch.no_grad():
        attention.softmax_offset.fill_(500.0)
    assert attention(100 * query, 100 * key, value, None).isfinite().all()


def test_attention_takes_no_mask_it_would_ignore() -> None:
    query = torch.randn(3, 1, 2, 8)
    with pytest.raises(AssertionError, match="no other mask"):
        SDPAttention(config())(query, query, query, torch.ones(3, 3).bool())
