"""Models with experts on a GPU, in both backends, against transformers. Skips by itself as `test_backend_gpu.py` does.

    PYTHONPATH=. python -m pytest tests/gpu/test_moe_gpu.py

Rounding sends some tokens to other experts than exact arithmetic does, and their logits far away. So where a backend
rounds, the median token's error is held against the reference model's own, and not the largest.

B batch, S sequence, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import Backend
from mcore.errors import ConfigError
from tests.gpu.test_backend_gpu import (
    EXACT,
    HAVE_TE,
    IDS_BS,
    LABELS_BS,
    MARGIN,
    POSITIONS_BS,
    TE,
    VOCAB_SIZE,
    empty_model,
    exact_logits,
    filled_model,
    relative_error,
    tf32,
)
from tests.tiny_models import tiny_hf_model
from tests.tiny_moe import MOE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOTH = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_first_dense")
"""What Transformer Engine's layers can express: no windows, no norms over a projection, no sinks."""
CASES = [
    *((name, "torch") for name in MOE),
    *(pytest.param(name, "transformer_engine", marks=TE.marks) for name in BOTH),
]


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with parallel_processes(Layout()) as device:
        yield device


def typical_error(exact_BSV: Tensor, found_BSV: Tensor) -> float:
    """Largest error of the median token, relative to the spread of the logits."""
    of_tokens_BS = (exact_BSV - found_BSV.detach().float().cpu()).abs().amax(-1)
    return (of_tokens_BS.median() / exact_BSV.std()).item()


@torch.no_grad()
def typical_noise(name: str, dtype: torch.dtype) -> float:
    """Of the reference model on this GPU, in bf16, or in TF32 for fp32 as Transformer Engine has it."""
    hf = tiny_hf_model(name, dtype=dtype)[0].cuda()
    with tf32():
        return typical_error(exact_logits(name), hf(IDS_BS.cuda()).logits)


@torch.no_grad()
def logits(name: str, backend: Backend, dtype: torch.dtype) -> Tensor:
    logits_BSP: Tensor = filled_model(name, backend, dtype).eval()(IDS_BS.cuda(), POSITIONS_BS.cuda(), None)
    assert logits_BSP.dtype == dtype
    return logits_BSP[..., :VOCAB_SIZE]


@pytest.mark.parametrize("name", MOE)
def test_logits_of_our_layers_equal_those_of_the_reference_model(name: str) -> None:
    assert relative_error(exact_logits(name), logits(name, "torch", torch.float32)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_rounded_logits_are_as_close_as_the_reference_models(name: str, backend: Backend, dtype: torch.dtype) -> None:
    error, noise = typical_error(exact_logits(name), logits(name, backend, dtype)), typical_noise(name, dtype)
    assert 0 < error < MARGIN * noise


@pytest.mark.parametrize("backend", ["torch", TE])
@pytest.mark.parametrize("name", BOTH)
def test_experts_and_router_get_gradients(name: str, backend: Backend) -> None:
    model = filled_model(name, backend, torch.float32).train()
    losses_BS = model(IDS_BS.cuda(), POSITIONS_BS.cuda(), None, labels=LABELS_BS.cuda())
    losses_BS.mean().backward()
    hf = tiny_hf_model(name)[0]
    expected_BS = F.cross_entropy(hf(IDS_BS).logits.transpose(1, 2), LABELS_BS, reduction="none")
    expected_BS.mean().backward()
    # Transformer Engine's TF32 sends some tokens elsewhere: there it's the typical number that is compared.
    bound = 1e-3 if backend == "torch" else 0.1
    for ours, theirs in (
        (model.decoder.layers[3].mlp.router, hf.model.layers[3].mlp.gate),
        (model.embedding.word_embeddings, hf.model.embed_tokens),
    ):
        found, reference = ours.weight.grad[: len(theirs.weight)].cpu(), theirs.weight.grad
        assert ((found - reference).abs().median() / reference.std()).item() < bound
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")
@pytest.mark.parametrize(("saved_by", "loaded_by"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
@pytest.mark.parametrize("name", BOTH)
def test_checkpoints_pass_from_one_backend_to_the_other(
    name: str, saved_by: Backend, loaded_by: Backend, tmp_path: Path
) -> None:
    saved = filled_model(name, saved_by, torch.bfloat16)
    dist_checkpointing.save({"model": saved.sharded_state_dict()}, str(tmp_path))
    loaded, expected = empty_model(name, loaded_by, torch.bfloat16), filled_model(name, loaded_by, torch.bfloat16)
    load_weights(loaded, tmp_path)
    pairs = zip(loaded.named_parameters(), expected.named_parameters(), strict=True)
    assert [key for (key, a), (_, b) in pairs if not torch.equal(a, b)] == []


@pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")
@pytest.mark.parametrize("name", ["gpt_oss", "olmoe", "mixtral_window"])
def test_what_transformer_engine_lacks_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="Set backend: torch"):
        build_model(
            tiny_hf_model(name)[1],
            padded_vocab_size=384,
            layout=Layout(),
            params_dtype=torch.bfloat16,
            backend="transformer_engine",
        )
