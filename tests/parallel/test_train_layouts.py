"""Training in every layout learns what one process learns, and a resumed run what an undisturbed one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.parallel.launch import run_torchrun
from tests.parallel.train_cases import CASES, EXPERTS, NORMED, RESUMED, RUNS, SAVE_STEPS
from tests.tiny_runs import make_base, recorded, saved_tensors, tiny_run

MODELS = ("llama", "qwen3_tied", *NORMED, EXPERTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes trains everything; one process trains the references."""
    folder = tmp_path_factory.mktemp("train")
    for name in MODELS:
        make_base(folder / name, name)
        with parallel_processes(Layout()):
            train(tiny_run(folder, save_steps=SAVE_STEPS), folder / name, folder / f"one-{name}")
    run_torchrun(2, Path(__file__).with_name("train_cases.py"), folder, folder=folder)
    return folder


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_every_layout_learns_what_one_process_learns(folder: Path, case: str, name: str) -> None:
    one, other = (read_metrics(folder / f"{run}-{name}" / "metrics.jsonl") for run in ("one", case))
    assert len(recorded(one, "loss")) == 12
    assert recorded(one, "loss")[-1] < recorded(one, "loss")[0] - 1
    for figure in ("loss", "validation_loss"):
        assert recorded(other, figure) == pytest.approx(recorded(one, figure), abs=1e-5)
    assert recorded(other, "grad_norm") == pytest.approx(recorded(one, "grad_norm"), abs=1e-4)
    assert recorded(other, "lr") == recorded(one, "lr")
    assert recorded(other, "consumed_tokens") == recorded(one, "consumed_tokens")


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_every_layout_hold_the_same_weights_and_moments(folder: Path, case: str) -> None:
    one, other = (saved_tensors(folder / f"{run}-qwen3_tied" / "iter_0000012") for run in ("one", case))
    if case == "dp2_whole":  # the plain optimizer of an fp32 model keeps no second copy of the weights
        one = {key: tensor for key, tensor in one.items() if not key.startswith("optimizer.state.param.")}
    assert other.keys() == one.keys()
    for key, tensor in one.items():
        assert torch.allclose(other[key], tensor, rtol=1e-3, atol=2e-5), key


def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(folder: Path) -> None:
    undisturbed, resumed = folder / "dp2-qwen3_tied", folder / "dp2_to_dp2-qwen3_tied"
    expected, found = (saved_tensors(run / "iter_0000012") for run in (undisturbed, resumed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    before, after = (read_metrics(run / "metrics.jsonl") for run in (undisturbed, resumed))
    for figure in ("loss", "validation_loss", "grad_norm", "lr", "consumed_tokens"):
        assert recorded(after, figure) == recorded(before, figure)


@pytest.mark.parametrize(("case", "name"), RESUMED)
def test_a_run_can_go_on_in_another_layout(folder: Path, case: str, name: str) -> None:
    one, resumed = (read_metrics(folder / f"{run}-{name}" / "metrics.jsonl") for run in ("one", case))
    assert recorded(resumed, "loss") == pytest.approx(recorded(one, "loss"), abs=1e-5)
    assert recorded(resumed, "validation_loss") == pytest.approx(recorded(one, "validation_loss"), abs=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_a_batch_that_the_processes_do_not_divide(folder: Path, rank: int) -> None:
    assert "train.global_batch_size: expected a multiple of" in (folder / f"refused-{rank}").read_text()


def test_all_ranks_train_on_what_rank_0_has_read(folder: Path) -> None:
    run = tiny_run(folder / "machine-0")
    with parallel_processes(Layout()):
        train(run, folder / "llama", folder / "first-machine")
    alone, together = (read_metrics(folder / name / "metrics.jsonl") for name in ("first-machine", "one-reader"))
    assert recorded(together, "loss") == pytest.approx(recorded(alone, "loss"), abs=1e-5)
