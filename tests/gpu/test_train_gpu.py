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

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.data.dataset import build_datasets
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
    shutil.copytree(folder / name, folder / f"{name}-resumed")
    shutil.rmtree(folder / f"{name}-resumed" / "iter_0000012")
    (folder / f"{name}-resumed" / "latest_checkpointed_iteration.txt").write_text("6")
    (folder / f"{name}-resumed" / "metrics.json").unlink()
    resumed = run_in(folder, f"{name}-resumed", **settings)
    assert recorded(resumed, "loss")[:7] == recorded(undisturbed, "loss")[:7]
    assert recorded(resumed, "loss") == pytest.approx(recorded(undisturbed, "loss"), abs=5e-3)
    assert json.loads((folder / f"{name}-resumed" / "metrics.json").read_text())["iterations"] == 12
