"""The optimizer in the host's memory, on a GPU. Skips by itself where there is no CUDA, or no Transformer Engine.

PYTHONPATH=. python -m pytest tests/gpu/test_offload_gpu.py
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

from benchmarks.memory import configure
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes, start
from mcore.bridge.families import dims_of
from mcore.metrics import read_metrics
from mcore.train.base import Base, open_base
from mcore.train.memory import estimate_training
from mcore.train.model import build_training
from mcore.train.run import train
from mcore.train.schedule import Schedule
from tests.tiny_models import tiny_hf_model
from tests.tiny_runs import make_base, recorded, saved_tensors, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs transformer_engine"),
]

STEPS, SAVE_STEPS = 10, 5
FRACTIONS = [1.0, 0.5]
BOUND = 5e-3
"""Of losses near 4, in bf16: the updates are torch's instead of Transformer Engine's, so weights round otherwise."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("offload")
    make_base(folder / "base", "qwen3_tied")
    with parallel_processes(Layout()):
        yield folder


def settings(fraction: float | None, **others: Any) -> dict[str, Any]:
    offload = {} if fraction is None else {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    common = {"train_iters": STEPS, "save_steps": SAVE_STEPS, "torch_dtype": "bfloat16", "backend": "torch"}
    return common | {"use_precision_aware_optimizer": True} | offload | others


def run_in(folder: Path, name: str, fraction: float | None, **others: Any) -> list[dict[str, Any]]:
    train(tiny_run(folder, **settings(fraction, **others)), folder / "base", folder / name)
    return read_metrics(folder / name / "metrics.jsonl")


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("others", [{}, {"main_grads_dtype": "bfloat16"}])
def test_losses_are_those_of_an_optimizer_on_the_gpu(folder: Path, fraction: float, others: dict[str, Any]) -> None:
    plain = run_in(folder, f"plain-{len(others)}", None, **others)
    offloaded = run_in(folder, f"offloaded-{fraction}-{len(others)}", fraction, **others)
    assert len(recorded(plain, "loss")) == STEPS
    assert recorded(plain, "loss")[-1] < recorded(plain, "loss")[0] - 0.5
    assert recorded(offloaded, "loss") == pytest.approx(recorded(plain, "loss"), abs=BOUND)
    assert recorded(offloaded, "grad_norm")[0] == pytest.approx(recorded(plain, "grad_norm")[0], rel=1e-2)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_resumed_run_ends_like_an_undisturbed_one(folder: Path, fraction: float) -> None:
    """Step counts included: a wrong one would show in the size of the first updates."""
    name, resumed = f"undisturbed-{fraction}", f"resumed-{fraction}"
    undisturbed = run_in(folder, name, fraction)
    shutil.copytree(folder / name, folder / resumed)
    shutil.rmtree(folder / resumed / f"iter_{STEPS:07d}")
    (folder / resumed / "latest_checkpointed_iteration.txt").write_text(str(SAVE_STEPS))
    (folder / resumed / "metrics.json").unlink()
    records = run_in(folder, resumed, fraction)
    assert recorded(records, "loss")[:SAVE_STEPS] == recorded(undisturbed, "loss")[:SAVE_STEPS]
    assert recorded(records, "loss") == pytest.approx(recorded(undisturbed, "loss"), abs=1e-3)
    expected, found = (saved_tensors(folder / run / f"iter_{STEPS:07d}") for run in (name, resumed))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key].float(), tensor.float(), atol=1e-4, rtol=2e-2), key
    assert json.loads((folder / resumed / "metrics.json").read_text())["iterations"] == STEPS


@pytest.mark.parametrize("fraction", [None, *FRACTIONS])
def test_memory_is_what_is_estimated_and_less_than_on_the_gpu(folder: Path, fraction: float | None) -> None:
    """Weights, gradients and optimizer of a model of 26 million parameters, before the first step and behind it."""
    hf_config = tiny_hf_model("qwen3_tied")[1] | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32768}
    run = tiny_run(folder, **settings(fraction))
    small = open_base(folder / "base", run)
    base = Base(hf_config, small.hf, small.weights, dims_of(hf_config).vocab)
    start(Layout())  # training left the process groups
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    training = build_training(run.train, Schedule(STEPS, 3), base, Layout(), has_weights=False)
    with torch.no_grad():
        for parameter in training.modules[0].parameters():
            parameter.normal_(std=0.02)
        for buffer in training.chunks[0].buffers:
            buffer.grad_data.normal_()
        training.optimizer.step()
    used = torch.cuda.memory_allocated() - before
    (estimate,) = estimate_training(
        configure(**settings(fraction)), hf_config, num_processes=1, row_tokens=64, longest=64,
        padded_vocab_size=base.padded_vocab_size, engine=False, on_gpu=True,
    )  # fmt: skip
    kept = estimate.weights + estimate.gradients + estimate.main_weights + estimate.moments
    slack = base.padded_vocab_size * 512 * 12 if fraction == 0.5 else 0  # whole parameters are offloaded, or not
    assert kept - slack - 1e6 < used < 1.05 * kept + 1e6
