"""Latent attention and layers for further tokens on a GPU, in both backends, against transformers.

    PYTHONPATH=. python -m pytest tests/gpu/test_latent_gpu.py

What is compared, and why typical errors are, is said in `test_moe_gpu.py`.

B batch, S sequence, H hidden, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights, model_tensors
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import Backend
from tests.gpu.test_backend_gpu import (
    EXACT,
    HAVE_TE,
    IDS_BS,
    LABELS_BS,
    MARGIN,
    POSITIONS_BS,
    TE,
    VOCAB_SIZE,
    exact_logits,
    filled_model,
    relative_error,
    tf32,
)
from tests.gpu.test_moe_gpu import logits, typical_error, typical_noise
from tests.tiny_latent import LATENT_MODELS
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model
from tests.tiny_mtp import MTP_MODELS, mtp_tensors, reference_logits, tiny_mtp_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BACKENDS = ("torch", TE)


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with parallel_processes(Layout()) as device:
        yield device


def mtp_model(name: str, backend: Backend, dtype: torch.dtype, *, is_filled: bool = True) -> GPTModel:
    main, further, config = tiny_mtp_model(name)
    model = build_model(
        config, padded_vocab_size=PADDED_VOCAB_SIZE, layout=Layout(), params_dtype=dtype, backend=backend
    )
    if is_filled:
        more = mtp_tensors(main, further)
        fill(model, mcore_tensors(main, config, padded_vocab_size=PADDED_VOCAB_SIZE, more=more))
    return model


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_logits_of_our_layers_equal_those_of_the_reference_model(name: str) -> None:
    assert relative_error(exact_logits(name), logits(name, "torch", torch.float32)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LATENT_MODELS)
def test_rounded_logits_are_as_close_as_the_reference_models(name: str, backend: Backend, dtype: torch.dtype) -> None:
    error, noise = typical_error(exact_logits(name), logits(name, backend, dtype)), typical_noise(name, dtype)
    assert 0 < error < MARGIN * noise


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight", "glm4_moe"])
def test_every_weight_gets_its_gradient(name: str, backend: Backend) -> None:
    model = filled_model(name, backend, torch.float32).train()
    model(IDS_BS.cuda(), POSITIONS_BS.cuda(), None, labels=LABELS_BS.cuda()).mean().backward()
    hf, config = tiny_hf_model(name)
    F.cross_entropy(hf(IDS_BS).logits.transpose(1, 2), LABELS_BS).backward()
    for parameter in hf.parameters():
        parameter.data = parameter.grad
    expected = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    # Transformer Engine's TF32 sends some tokens elsewhere: there it's the typical number that is compared.
    bound = 1e-3 if backend == "torch" else 0.1
    for part in model_tensors(model):
        if not part.key.endswith("expert_bias"):
            reference = expected[part.key][part.global_slice()].reshape(part.data.shape)
            error = (part.data.cpu() - reference).abs().median() / expected[part.key].std()
            assert error < bound, part.key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MTP_MODELS)
@torch.no_grad()
def test_logits_of_further_tokens_equal_the_reports(name: str, backend: Backend) -> None:
    main, further, _ = tiny_mtp_model(name)
    model = mtp_model(name, backend, torch.float32).eval()
    hidden_SBH = main.model(IDS_BS).last_hidden_state.transpose(0, 1).contiguous().cuda()
    exact = reference_logits(main, further, IDS_BS)
    of_depths = model.further_logits(IDS_BS.cuda(), POSITIONS_BS.cuda(), hidden_SBH)
    with tf32():
        noise = [typical_error(*pair) for pair in zip(exact, _noisy(main, further), strict=True)]
    for logits_BSV, logits_BSP, of_reference in zip(exact, of_depths, noise, strict=True):
        error = typical_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE])
        assert error < (EXACT if backend == "torch" else MARGIN * of_reference)


def _noisy(main: torch.nn.Module, further: torch.nn.Module) -> list[torch.Tensor]:
    return reference_logits(main.cuda(), further.cuda(), IDS_BS.cuda())


@pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")
@pytest.mark.parametrize(("saved_by", "loaded_by"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
@pytest.mark.parametrize("name", MTP_MODELS)
def test_checkpoints_pass_from_one_backend_to_the_other(
    name: str, saved_by: Backend, loaded_by: Backend, tmp_path: Path
) -> None:
    saved = mtp_model(name, saved_by, torch.bfloat16)
    dist_checkpointing.save({"model": saved.sharded_state_dict()}, str(tmp_path))
    loaded = mtp_model(name, loaded_by, torch.bfloat16, is_filled=False)
    expected = mtp_model(name, loaded_by, torch.bfloat16)
    load_weights(loaded, tmp_path)
    pairs = zip(loaded.state_dict().items(), expected.state_dict().items(), strict=True)
    different = [key for (key, a), (_, b) in pairs if isinstance(a, torch.Tensor) and not torch.equal(a, b)]
    assert [key for key in different if not key.endswith("_extra_state")] == []
    assert loaded.decoder.layers[1].mlp.router.expert_bias.dtype == torch.float32
