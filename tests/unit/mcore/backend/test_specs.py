"""Our own norm and attention against the reference model's. S sequence, B batch, N heads, G groups, D head size."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mcore.backend.attention import SDPAttention
from mcore.backend.norms import RMSNorm
from mcore.backend.specs import resolve_backend
from mcore.errors import ConfigError

pytestmark = pytest.mark.usefixtures("alone")
DTYPES = [torch.float32, torch.bfloat16]


def config(dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        params_dtype=dtype,
        sequence_parallel=sequence_parallel,
        attention_dropout=0.0,
        softmax_type="vanilla",
        layernorm_zero_centered_gamma=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_the_norm_is_the_reference_models_to_the_bit(dtype: torch.dtype, eps: float) -> None:
    ours, reference = RMSNorm(config(dtype), 48, eps), LlamaRMSNorm(48, eps).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(1 + 0.3 * torch.randn(48))
        reference.weight.copy_(ours.weight)
    hidden = (3 * torch.randn(5, 2, 48)).to(dtype)
    assert ours.weight.dtype == dtype
    assert torch.equal(ours(hidden), reference(hidden))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_norms_weight_says_whether_its_gradient_is_a_part(sequence_parallel: bool) -> None:
    norm = RMSNorm(config(sequence_parallel=sequence_parallel), 8)
    assert norm.weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_causal_grouped_and_scaled(groups: int, scale: float | None) -> None:
    query, key, value = (torch.randn(7, 2, n, 16) for n in (6, groups, groups))
    context = SDPAttention(config(), softmax_scale=scale)(query, key, value, None)

    key, value = (x.repeat_interleave(6 // groups, dim=2) for x in (key, value))
    scores_BNST = torch.einsum("sbnd,tbnd->bnst", query, key) * (scale or 1 / math.sqrt(16))
    scores_BNST.masked_fill_(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnst,tbnd->sbnd", scores_BNST.softmax(-1), value).flatten(2)
    torch.testing.assert_close(context, expected, atol=1e-6, rtol=1e-5)


def test_attention_takes_no_mask_it_would_ignore() -> None:
    query = torch.randn(3, 1, 2, 8)
    with pytest.raises(AssertionError, match="no other mask"):
        SDPAttention(config())(query, query, query, torch.ones(3, 3).bool())


def test_auto_is_torch_without_cuda() -> None:
    assert resolve_backend("auto") == resolve_backend("torch") == "torch"


def test_transformer_engine_is_refused_with_everything_it_lacks() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_backend("transformer_engine")
    assert [problem.subject for problem in caught.value.problems] == [
        "CUDA",
        "transformer_engine",
        "Set backend: torch.",
    ]
