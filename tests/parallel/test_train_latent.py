"""Latent attention, experts and layers for further tokens: every layout learns what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.parallel.launch import run_torchrun
from tests.parallel.train_latent_cases import CASES
from tests.tiny_models import PADDED_VOCAB_SIZE
from tests.tiny_mtp import write_mtp_folder
from tests.tiny_runs import recorded, saved_tensors, tiny_run, tiny_tokenizer

pytestmark = pytest.mark.layouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_mtp_folder(folder / "hf", "deepseek_v3")
    tiny_tokenizer().save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "base", make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    with parallel_processes(Layout()):
        train(tiny_run(folder), folder / "base", folder / "one")
    run_torchrun(2, Path(__file__).with_name("train_latent_cases.py"), folder, folder=folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_layout_learns_what_one_process_learns(folder: Path, case: str) -> None:
    one, other = (read_metrics(folder / run / "metrics.jsonl") for run in ("one", case))
    assert len(recorded(one, "loss")) == 12
    assert recorded(one, "loss")[-1] < recorded(one, "loss")[0] - 1
    for figure in ("loss", "validation_loss"):
        assert recorded(other, figure) == pytest.approx(recorded(one, figure), abs=1e-5)
    assert recorded(other, "grad_norm") == pytest.approx(recorded(one, "grad_norm"), abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_every_layout_hold_the_same_weights(folder: Path, case: str) -> None:
    runs = ("base/release", "one/iter_0000012", f"{case}/iter_0000012")
    base, one, other = (saved_tensors(folder / run) for run in runs)
    assert base.keys() <= one.keys()
    for key, tensor in base.items():
        assert torch.allclose(other[key], one[key], rtol=1e-3, atol=2e-5), key
        is_left_alone = key.startswith("mtp.") or key.endswith("expert_bias")
        assert torch.equal(other[key], tensor) == is_left_alone, key
