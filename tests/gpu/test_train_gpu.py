"""Training on a GPU, in both backends. Skips by itself where there is no CUDA, or no Transformer Engine.

PYTHONPATH=. python -m pytest tests/gpu/test_train_gpu.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore.backend.cross_entropy import ChosenTokenLosses
from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import resolve_backend
from mcore.data.prepare.build import build_datasets
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.reference_training import train_with_transformers
from tests.tiny_models import tiny_hf_model
from tests.tiny_runs import make_base, recorded, tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
TE = pytest.param("transformer_engine", marks=pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# fp32 on the torch backend has no TF32 and no noise to speak of; Transformer Engine multiplies fp32 in TF32.
BOUNDS = {
    ("torch", "float32"): 1e-4,
    ("torch", "bfloat16"): 1e-2,
    ("transformer_engine", "float32"): 1e-2,
    ("transformer_engine", "bfloat16"): 1e-2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gpu")
    make_base(folder / "base", "qwen3_tied")
    with parallel_processes(Layout()):
        yield folder


def run_in(folder: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    train(tiny_run(folder, **settings), folder / "base", folder / name)
    return read_metrics(folder / name / "metrics.jsonl")


def back_to_step_6(folder: Path, name: str) -> str:
    """A copy of a run as it is on disk if it is killed before its last checkpoint; its name."""
    resumed = folder / f"{name}-resumed"
    shutil.copytree(folder / name, resumed)
    shutil.rmtree(resumed / "iter_0000012")
    (resumed / "latest_checkpointed_iteration.txt").write_text("6")
    (resumed / "metrics.json").unlink()
    return resumed.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", TE])
def test_training_is_what_transformers_and_torch_do(folder: Path, backend: str, dtype: str) -> None:
    records = run_in(folder, f"{backend}-{dtype}", backend=backend, torch_dtype=dtype)
    run = tiny_run(folder)
    data, _ = build_datasets(run.data, "sft", folder / "base" / "hf")
    model = tiny_hf_model("qwen3_tied", dtype=DTYPES[dtype])[0].cuda()
    expected = train_with_transformers(model, run, data)
    assert recorded(records, "loss") == pytest.approx(expected, abs=BOUNDS[backend, dtype])
    assert all(0 < value < 1 for value in recorded(records, "memory_gib"))


@pytest.mark.parametrize("backend", ["torch", TE])
def test_recomputation_learns_the_same(folder: Path, backend: str) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain = run_in(folder, f"{backend}-bfloat16", backend=backend, torch_dtype="bfloat16")
    recomputed = run_in(folder, f"{backend}-recompute", backend=backend, torch_dtype="bfloat16", **full)
    assert recorded(recomputed, "loss") == pytest.approx(recorded(plain, "loss"), abs=5e-3)


@pytest.mark.parametrize("backend", ["torch", TE])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_resumed_run_learns_what_an_undisturbed_one_does(folder: Path, backend: str, distributed: bool) -> None:
    name = f"{backend}-{distributed}"
    settings = {
        "backend": backend,
        "torch_dtype": "bfloat16",
        "save_steps": 6,
        "use_distributed_optimizer": distributed,
    }
    undisturbed = run_in(folder, name, **settings)
    resumed = run_in(folder, back_to_step_6(folder, name), **settings)
    assert recorded(resumed, "loss")[:7] == recorded(undisturbed, "loss")[:7]
    assert recorded(resumed, "loss") == pytest.approx(recorded(undisturbed, "loss"), abs=5e-3)
    assert json.loads((folder / f"{name}-resumed" / "metrics.json").read_text())["iterations"] == 12


PRECISION_AWARE = {"use_precision_aware_optimizer": True}
LEAN = PRECISION_AWARE | dict.fromkeys(("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), "bfloat16")
NEEDS_TE = pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")


@NEEDS_TE
@pytest.mark.parametrize("name", ["qwen3_tied", "llama"])
def test_fused_weight_gradients_learn_the_same(tmp_path: Path, name: str) -> None:
    make_base(tmp_path / "base", name)
    settings = {"backend": "transformer_engine", "torch_dtype": "bfloat16", "micro_batch_size": 2}
    plain = run_in(tmp_path, "plain", gradient_accumulation_fusion=False, **settings)
    fused = run_in(tmp_path, "fused", gradient_accumulation_fusion=True, **settings)
    assert recorded(fused, "loss") == pytest.approx(recorded(plain, "loss"), abs=5e-3)
    assert recorded(fused, "grad_norm") == pytest.approx(recorded(plain, "grad_norm"), rel=2e-2)


@NEEDS_TE
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@pytest.mark.parametrize(("settings", "bound"), [(PRECISION_AWARE, 5e-3), (LEAN, 2e-2)])
def test_a_lean_optimizer_learns_the_same_and_resumes(
    folder: Path, backend: str, settings: dict[str, Any], bound: float
) -> None:
    name = f"{backend}-lean-{len(settings)}"
    common = {"backend": backend, "torch_dtype": "bfloat16", "save_steps": 6}
    plain = run_in(folder, f"{name}-plain", **common)
    lean = run_in(folder, name, **common, **settings)
    assert recorded(lean, "loss") == pytest.approx(recorded(plain, "loss"), abs=bound)
    resumed = back_to_step_6(folder, name)
    again = run_in(folder, resumed, **common, **settings)
    assert recorded(again, "loss") == pytest.approx(recorded(lean, "loss"), abs=5e-3)


@pytest.mark.parametrize("backend", ["torch", TE])
def test_logits_are_held_a_chunk_at_a_time(backend: str) -> None:
    """A vocabulary of 131072 and 4096 tokens: 1 GiB of bf16 logits, of which an eighth is held."""
    hf_config = tiny_hf_model("qwen3_tied")[1] | {"vocab_size": 131072}
    ids_BS = torch.randint(131072, (2, 2048), device="cuda")
    positions_BS = torch.arange(2048, device="cuda").expand(2, -1)
    peaks, losses, gradients = [], [], []
    for chunk_tokens in (None, 512):
        model = build_model(
            hf_config,
            padded_vocab_size=131072,
            layout=Layout(),
            params_dtype=torch.bfloat16,
            backend=resolve_backend(backend),
        ).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.05)
        ChosenTokenLosses(model, chunk_tokens).places_T = torch.arange(4096, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses_1T = model(ids_BS, positions_BS, None, labels=ids_BS.t().reshape(1, -1))
        losses_1T.sum().backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**30)
        losses.append(losses_1T.detach())
        gradients.append(model.embedding.word_embeddings.weight.grad.float())
        del model, losses_1T
    assert peaks[0] > 2 and peaks[1] < peaks[0] / 3, peaks
    torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=1e-3)
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()
