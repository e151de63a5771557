"""Packed or padded, in every layout, a run learns what one process learns from padded samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.parallel.launch import run_torchrun
from tests.parallel.train_packed_cases import MODELS, RUNS, STEPS, packed_run
from tests.tiny_runs import make_base, recorded, saved_tensors, write_rows

pytestmark = pytest.mark.layouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes trains everything; one process trains the references. Some answers have weights."""
    folder = tmp_path_factory.mktemp("packed")
    write_rows(folder / "train.jsonl", 22, seed=22, weighted=True)
    write_rows(folder / "validation.jsonl", 7, seed=7, weighted=True)
    for name in MODELS:
        make_base(folder / name, name)
        with parallel_processes(Layout()):
            train(packed_run(folder, 1, packing=False), folder / name, folder / f"one-{name}")
    run_torchrun(2, Path(__file__).with_name("train_packed_cases.py"), folder, folder=folder, timeout_s=1200)
    return folder


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("case", "name"), RUNS)
def test_every_layout_learns_what_one_process_learns_from_padded_samples(folder: Path, case: str, name: str) -> None:
    one, other = (read_metrics(folder / f"{run}-{name}" / "metrics.jsonl") for run in ("one", case))
    assert len(recorded(one, "loss")) == STEPS
    for figure in ("loss", "validation_loss"):
        assert recorded(other, figure) == pytest.approx(recorded(one, figure), abs=1e-5)
    for figure in ("lr", "consumed_tokens", "expert_tokens"):
        assert recorded(other, figure) == recorded(one, figure)
    weights = f"iter_{STEPS:07d}"
    expected, found = (saved_tensors(folder / f"{run}-{name}" / weights) for run in ("one", case))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=1e-4, rtol=0), key
