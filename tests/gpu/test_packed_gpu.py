"""Packed training on a GPU, in both backends. Skips by itself where there is no CUDA, or no Transformer Engine.

PYTHONPATH=. python -m pytest tests/gpu/test_packed_gpu.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.tiny_runs import make_base, recorded, tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
TE = pytest.param("transformer_engine", marks=pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine"))
# As in test_train_gpu.py: Transformer Engine multiplies fp32 in TF32.
BOUNDS = {("torch", "float32"): 1e-4}
ELSE = 1e-2


@pytest.mark.parametrize("backend", ["torch", TE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_packed_learns_what_padded_learns(tmp_path: Path, name: str, backend: str, dtype: str) -> None:
    make_base(tmp_path / "base", name)
    runs = []
    for packing in (True, False):
        run = tiny_run(tmp_path, backend=backend, torch_dtype=dtype, packing=packing)
        with parallel_processes(Layout()):
            train(run, tmp_path / "base", tmp_path / f"packing-{packing}")
        runs.append(read_metrics(tmp_path / f"packing-{packing}" / "metrics.jsonl"))
    packed, padded = runs
    assert recorded(padded, "loss")[-1] < recorded(padded, "loss")[0] - 1
    for figure in ("loss", "validation_loss"):
        expected = recorded(padded, figure)
        assert recorded(packed, figure) == pytest.approx(expected, abs=BOUNDS.get((backend, dtype), ELSE))
    assert recorded(packed, "consumed_tokens") == recorded(padded, "consumed_tokens")
