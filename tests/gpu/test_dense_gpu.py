"""Dense models of every rope, and classifiers, in both backends on a GPU. Skips by itself where there is no CUDA.

    PYTHONPATH=. python -m pytest tests/gpu/test_dense_gpu.py

What is allowed is as in `test_backend_gpu.py`: a multiple of the reference model's own noise in the same arithmetic.

B batch, S sequence, T tokens of packed sequences, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from transformers import PreTrainedModel

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import Backend
from tests.gpu.test_backend_gpu import (
    EXACT,
    HAVE_TE,
    IDS_BS,
    MARGIN,
    POSITIONS_BS,
    TE,
    filled_model,
    relative_error,
    tf32,
)
from tests.tiny_classifiers import CLASSIFIERS
from tests.tiny_dense import DENSE
from tests.tiny_models import tiny_hf_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ENGINE_BUILDS = (
    "llama_dynamic",
    "llama_yarn",
    "mistral_full",
    "qwen2_yarn",
    "phi3_long",
    "phi3_short",
    "phi4_partial",
    "llama_classifier",
    "qwen2_reward",
    "phi3_classifier",
)
"""Models without windows or biases on the attention alone, which Transformer Engine's layers are refused for."""
PACKED_LENGTHS = (20, 26, 18)
"""All past the context before scaling, so that each sequence by itself has the frequencies that the longest has."""


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with parallel_processes(Layout()) as device:
        yield device


def logits_of(hf: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """At every position, a classifier's as well."""
    return hf.score(hf.model(ids_BS)[0]) if hasattr(hf, "score") else hf(ids_BS).logits


def allowed(name: str, backend: Backend, dtype: torch.dtype, exact: torch.Tensor, ids_BS: torch.Tensor) -> float:
    if (backend, dtype) == ("torch", torch.float32):
        return EXACT
    hf = tiny_hf_model(name, dtype=dtype)[0].cuda()
    if dtype == torch.float32:
        with tf32():
            return MARGIN * relative_error(exact, logits_of(hf, ids_BS.cuda()))
    return MARGIN * relative_error(exact, logits_of(hf, ids_BS.cuda()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("torch", name) for name in [*DENSE, *CLASSIFIERS]),
        *(pytest.param("transformer_engine", name, marks=TE.marks) for name in ENGINE_BUILDS),
    ],
)
def test_logits_equal_those_of_the_reference_model(name: str, backend: Backend, dtype: torch.dtype) -> None:
    exact = logits_of(tiny_hf_model(name)[0], IDS_BS)
    found = filled_model(name, backend, dtype).eval()(IDS_BS.cuda(), POSITIONS_BS.cuda(), None)
    assert found.dtype == dtype
    assert relative_error(exact, found[..., : exact.shape[-1]]) < allowed(name, backend, dtype, exact, IDS_BS)


def packed_logits(model: GPTModel, ids_T: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0, *torch.tensor(PACKED_LENGTHS).cumsum(0)], dtype=torch.int32, device="cuda")
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(PACKED_LENGTHS),
        max_seqlen_kv=max(PACKED_LENGTHS),
    )
    positions_T = torch.cat([torch.arange(length) for length in PACKED_LENGTHS]).cuda()
    return model(ids_T[None].cuda(), positions_T[None], None, packed_seq_params=packing)[0]


@torch.no_grad()
@pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["llama3", "llama_yarn", "phi4_partial"])
def test_packed_sequences_turn_as_they_do_alone(name: str, fused: bool | None) -> None:
    """A rope with a factor is not fused; the control is that the fused kernel would leave the factor out."""
    ids_T = IDS_BS.flatten()[: sum(PACKED_LENGTHS)]
    parts = [part[None] for part in ids_T.split(PACKED_LENGTHS)]
    hf = tiny_hf_model(name)[0]
    exact = torch.cat([logits_of(hf, part)[0] for part in parts])
    half = tiny_hf_model(name, dtype=torch.bfloat16)[0].cuda()
    noise = relative_error(exact, torch.cat([logits_of(half, part.cuda())[0] for part in parts]))
    model = filled_model(name, "transformer_engine", torch.bfloat16).eval()
    has_factor = name != "llama3"
    assert model.config.apply_rope_fusion is not has_factor
    if fused is not None:
        model.config.apply_rope_fusion = fused
    error = relative_error(exact, packed_logits(model, ids_T)[:, : exact.shape[-1]])
    assert (error < MARGIN * noise) is not (fused is True and has_factor)
