"""Every layout learns what one process learns, and that is what a plain loop with transformers learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.data.prepare.build import build_datasets
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.parallel.launch import run_torchrun
from tests.parallel.train_every_layout_cases import (
    ALL_MODELS,
    BALANCED,
    BALANCING,
    CASES,
    EXPERTS,
    LATENT,
    RESUMED,
    STEPS,
    layout_run,
)
from tests.reference_training import train_with_transformers
from tests.tiny_models import PADDED_VOCAB_SIZE, mcore_tensors
from tests.tiny_runs import make_base, recorded, saved_tensors

pytestmark = pytest.mark.layouts

RUNS = [(case, name) for of_size in CASES.values() for case, (_, models) in of_size.items() for name in models]
BALANCED_CASES = [case for of_size in BALANCED.values() for case in of_size]
LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and final weights of the plain loop, by model; filled by `folder`."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plain: dict[str, tuple[list[float], dict[str, Tensor]]]) -> Path:
    """A launch for each number of processes trains everything; one process and transformers train the references."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in ALL_MODELS:
        model, hf_config = make_base(folder / name, name)
        run = layout_run(folder, 1, name)
        with parallel_processes(Layout()):
            train(run, folder / name, folder / f"one-{name}")
        data, _ = build_datasets(run.data, "sft", folder / name / "hf")
        losses = train_with_transformers(model, run, data)
        plain[name] = losses, mcore_tensors(model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE)
    with parallel_processes(Layout()):
        train(layout_run(folder, 1, LATENT, **BALANCING), folder / LATENT, folder / "balanced-one")
    script = Path(__file__).with_name("train_every_layout_cases.py")
    for nproc in CASES:
        run_torchrun(nproc, script, folder, folder=folder, timeout_s=1500)
    return folder


def check_same(folder: Path, one: str, other: str) -> None:
    before, after = (read_metrics(folder / run / "metrics.jsonl") for run in (one, other))
    for figure in ("loss", "validation_loss"):
        assert recorded(after, figure) == pytest.approx(recorded(before, figure), abs=1e-5)
    assert recorded(after, "grad_norm") == pytest.approx(recorded(before, "grad_norm"), abs=1e-4)
    assert recorded(after, "expert_tokens") == recorded(before, "expert_tokens")


def test_there_are_at_least_thirty_layouts() -> None:
    assert len({case for case, _ in RUNS}) >= 30


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ALL_MODELS)
def test_one_process_learns_what_a_plain_loop_learns(
    folder: Path, plain: dict[str, tuple[list[float], dict[str, Tensor]]], name: str
) -> None:
    losses = recorded(read_metrics(folder / f"one-{name}" / "metrics.jsonl"), "loss")
    assert losses == pytest.approx(plain[name][0], abs=1e-5)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_every_layout_learns_what_one_process_learns(folder: Path, case: str, name: str) -> None:
    check_same(folder, f"one-{name}", f"{case}-{name}")


@pytest.mark.parametrize(("case", "name"), [*(("one", name) for name in ALL_MODELS), *RUNS])
def test_every_layout_ends_with_the_weights_of_a_plain_loop(
    folder: Path, plain: dict[str, tuple[list[float], dict[str, Tensor]]], case: str, name: str
) -> None:
    found = saved_tensors(folder / f"{case}-{name}" / LAST)
    for key, tensor in plain[name][1].items():
        assert torch.allclose(found[key], tensor, atol=1e-4, rtol=0), key


@pytest.mark.parametrize("case", BALANCED_CASES)
def test_experts_are_balanced_alike_in_every_layout(folder: Path, case: str) -> None:
    check_same(folder, "balanced-one", f"balanced-{case}")
    one, other = (saved_tensors(folder / run / LAST) for run in ("balanced-one", f"balanced-{case}"))
    unbalanced = saved_tensors(folder / f"one-{LATENT}" / LAST)
    for layer in (1, 2, 3):
        bias = f"decoder.layers.{layer}.mlp.router.expert_bias"
        assert torch.equal(one[bias], other[bias])
        assert (one[bias] - unbalanced[bias]).abs().max() > 0.02


@pytest.mark.parametrize(("before", "after"), RESUMED.items())
def test_a_run_goes_on_with_its_experts_elsewhere(folder: Path, before: str, after: str) -> None:
    """Weights and both moments of every expert, divided in another way than they were saved."""
    check_same(folder, f"one-{EXPERTS}", f"{before}_to_{after}")
    one, other = (saved_tensors(folder / run / LAST) for run in (f"one-{EXPERTS}", f"{before}_to_{after}"))
    assert one.keys() == other.keys()
    assert any("experts" in key and key.startswith("optimizer.state.exp_avg_sq.") for key in one)
    for key, tensor in one.items():
        assert torch.allclose(other[key], tensor, rtol=1e-3, atol=2e-5), key
