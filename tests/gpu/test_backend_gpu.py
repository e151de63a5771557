"""Both backends on a GPU against transformers. Skips by itself where there is no CUDA, or no Transformer Engine.

    PYTHONPATH=. python -m pytest tests/gpu/test_backend_gpu.py

Bounds are taken from the reference model's own noise on the same GPU: Transformer Engine multiplies fp32 matrices in
TF32, so its fp32 is measured against the reference model's TF32, and bf16 against the reference model's bf16.

B batch, S sequence, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import Backend, resolve_backend
from mcore.bridge.features import Features
from tests.tiny_models import MODELS, PADDED_VOCAB_SIZE, SIZES, fill, mcore_tensors, tiny_hf_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
TE = pytest.param("transformer_engine", marks=pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine"))
VOCAB_SIZE = SIZES["vocab_size"]
IDS_BS = torch.randint(0, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(1))
LABELS_BS = IDS_BS.roll(-1, dims=1)
POSITIONS_BS = torch.arange(64).expand(2, -1)
EXACT = 2e-5
MARGIN = 2.0
"""How many times the reference model's own noise is allowed: two kernels may round in opposite directions."""


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with parallel_processes(Layout()) as device:
        yield device


def filled_model(name: str, backend: Backend, dtype: torch.dtype) -> GPTModel:
    hf, config = tiny_hf_model(name)
    model = empty_model(name, backend, dtype)
    fill(model, mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE))
    return model


def empty_model(name: str, backend: Backend, dtype: torch.dtype) -> GPTModel:
    return build_model(
        tiny_hf_model(name)[1],
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=Layout(),
        params_dtype=dtype,
        backend=backend,
    )


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@torch.no_grad()
def exact_logits(name: str) -> torch.Tensor:
    """The reference model's fp32 logits, computed on the CPU, `[B, S, V]`."""
    return tiny_hf_model(name)[0](IDS_BS).logits


@torch.no_grad()
def noise(name: str, backend: str, dtype: torch.dtype) -> float:
    """Error of the reference model itself on this GPU, in the arithmetic that the backend uses for the dtype."""
    hf = tiny_hf_model(name, dtype=dtype)[0].cuda()
    if backend == "transformer_engine" and dtype == torch.float32:
        with tf32():
            return relative_error(exact_logits(name), hf(IDS_BS.cuda()).logits)
    return relative_error(exact_logits(name), hf(IDS_BS.cuda()).logits)


def relative_error(reference: torch.Tensor, found: torch.Tensor) -> float:
    return ((reference - found.detach().float().cpu()).abs().max() / reference.std()).item()


def bound(name: str, backend: str, dtype: torch.dtype) -> float:
    return EXACT if (backend, dtype) == ("torch", torch.float32) else MARGIN * noise(name, backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", TE])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_reference_model(name: str, backend: Backend, dtype: torch.dtype) -> None:
    model = filled_model(name, backend, dtype).eval()
    with torch.no_grad():
        logits_BSP = model(IDS_BS.cuda(), POSITIONS_BS.cuda(), None)
    error = relative_error(exact_logits(name), logits_BSP[..., :VOCAB_SIZE])
    assert logits_BSP.dtype == dtype
    assert error < bound(name, backend, dtype)
    assert logits_BSP.float().softmax(-1)[..., VOCAB_SIZE:].sum() == 0


@pytest.mark.parametrize("granularity", ["none", "selective"])
@pytest.mark.parametrize("backend", ["torch", TE])
@pytest.mark.parametrize("name", ["llama_bias", "llama3", "qwen3"])
def test_losses_and_gradients_do_not_know_of_the_padding(name: str, backend: Backend, granularity: str) -> None:
    hf, config = tiny_hf_model(name)
    model = build_model(
        config,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=Layout(),
        params_dtype=torch.float32,
        backend=backend,
        recompute_granularity=granularity,
    ).train()
    fill(model, mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE))
    losses_BS = model(IDS_BS.cuda(), POSITIONS_BS.cuda(), None, labels=LABELS_BS.cuda())
    losses_BS.mean().backward()
    expected_BS = F.cross_entropy(hf(IDS_BS).logits.transpose(1, 2), LABELS_BS, reduction="none")
    expected_BS.mean().backward()

    tolerance = 5e-5 if backend == "torch" else MARGIN * noise(name, backend, torch.float32)
    torch.testing.assert_close(losses_BS.cpu(), expected_BS, atol=tolerance, rtol=0)
    gradient = model.embedding.word_embeddings.weight.grad
    reference = hf.get_input_embeddings().weight.grad
    assert relative_error(reference, gradient[:VOCAB_SIZE]) < 10 * tolerance
    for weight in (model.embedding.word_embeddings.weight, model.shared_embedding_or_output_weight()):
        assert weight.grad[VOCAB_SIZE:].abs().max() == 0


@pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")
@pytest.mark.parametrize(("saved_by", "loaded_by"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
@pytest.mark.parametrize("name", ["llama_bias", "qwen3_tied"])
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
def test_auto_is_transformer_engine_where_it_imports() -> None:
    assert resolve_backend("auto") == "transformer_engine"
    assert resolve_backend("auto", Features(windows=(4, None))) == "torch"


def test_a_plan_on_the_meta_device_leaves_the_gpu_alone() -> None:
    code = (
        "import torch; from mcore.backend.meta import sharded_shapes; from tests.tiny_models import tiny_hf_model;"
        "sharded_shapes(tiny_hf_model('llama')[1], padded_vocab_size=384, params_dtype=torch.bfloat16);"
        "raise SystemExit(torch.cuda.is_initialized())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
