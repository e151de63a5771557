"""Gradients and weights that go between processes beside computation: a run learns the same, and resumes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.metrics import read_metrics
from tests.parallel.launch import run_torchrun
from tests.parallel.overlap_cases import CASES, MODELS, RESUMED, RUNS, SAVE_STEPS, STEPS
from tests.tiny_runs import make_base, recorded, saved_tensors

pytestmark = pytest.mark.layouts

LAST = f"iter_{STEPS:07d}"
FIGURES = ("loss", "validation_loss", "grad_norm", "lr", "consumed_tokens")
OVERLAPPING = [(case, how) for case, how in RUNS if how != "plain"]
TO_THE_BIT = ("dp2_again", "padded_again", "lora_again")
"""Resumed runs in the layout and with the settings that they had."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A launch of two processes and one of four train everything."""
    folder = tmp_path_factory.mktemp("overlap")
    for name in MODELS:
        make_base(folder / name, name)
    for nproc in sorted({case.nproc for case in CASES.values()}):
        run_torchrun(nproc, Path(__file__).with_name("overlap_cases.py"), folder, folder=folder, timeout_s=1200)
    return folder


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("case", "how"), OVERLAPPING)
def test_a_run_with_overlap_learns_what_one_without_does(folder: Path, case: str, how: str) -> None:
    plain, other = (read_metrics(folder / f"{case}-{run}" / "metrics.jsonl") for run in ("plain", how))
    assert len(recorded(plain, "loss")) == STEPS
    assert len(set(recorded(plain, "loss"))) == STEPS
    # Sums of a bucket are the sums of its numbers. Only the gradient's norm, which weights are scaled by, is summed in
    # another order, where shares of processes begin elsewhere; in bf16 that shows where a weight is rounded.
    bound = 1e-6 if "bf16" not in case else 2e-3
    for figure in ("loss", "validation_loss"):
        assert recorded(other, figure) == pytest.approx(recorded(plain, figure), abs=bound)
    for figure in ("lr", "consumed_tokens"):
        assert recorded(other, figure) == recorded(plain, figure)
    expected, found = (saved_tensors(folder / f"{case}-{run}" / LAST) for run in ("plain", how))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=bound, rtol=bound), key


@pytest.mark.parametrize("name", TO_THE_BIT)
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(folder: Path, name: str) -> None:
    before = RESUMED[name][0]
    undisturbed, resumed = folder / f"{before}-both", folder / f"resumed-{name}"
    expected, found = (saved_tensors(run / LAST) for run in (undisturbed, resumed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    for figure in FIGURES:
        one, other = (recorded(read_metrics(run / "metrics.jsonl"), figure) for run in (undisturbed, resumed))
        assert other == one


@pytest.mark.parametrize("name", [name for name in RESUMED if name not in TO_THE_BIT])
def test_a_run_goes_on_in_another_layout_or_without_overlap(folder: Path, name: str) -> None:
    """What was loaded is compared with the file, moments included, before the first step."""
    one, other = (
        read_metrics(folder / run / "metrics.jsonl") for run in (f"{RESUMED[name][0]}-both", f"resumed-{name}")
    )
    assert recorded(other, "loss")[:SAVE_STEPS] == recorded(one, "loss")[:SAVE_STEPS]
    for figure in ("loss", "validation_loss"):
        assert recorded(other, figure) == pytest.approx(recorded(one, figure), abs=1e-5)
