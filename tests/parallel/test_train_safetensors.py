"""Training from safetensors to safetensors ends, bit for bit, as training from a conversion and an export do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.select import iterations_in
from tests.hf_folders import write_hf_folder
from tests.parallel.launch import run_torchrun
from tests.parallel.train_safetensors_cases import CASES
from tests.tiny_runs import saved_tensors, tiny_tokenizer

pytestmark = pytest.mark.layouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safetensors")
    for name in {name for name, _ in CASES.values()}:
        write_hf_folder(folder / name / "hf", name, dtype=torch.bfloat16)
        tiny_tokenizer().save_pretrained(folder / name / "hf")
        convert(folder / name / "hf", folder / name / "mcore")
    run_torchrun(2, Path(__file__).with_name("train_safetensors_cases.py"), folder, folder=folder, timeout_s=600)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_routes_learn_the_same(folder: Path, case: str) -> None:
    live, file = (folder / f"{case}-{route}" for route in ("live", "file"))
    assert iterations_in(live) == iterations_in(file) and iterations_in(live)[-1] == 6
    one, other = saved_tensors(live / "iter_0000006"), saved_tensors(file / "iter_0000006")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_is_there_in_both_shapes(folder: Path, tmp_path: Path, case: str) -> None:
    run = folder / f"{case}-live"
    iterations = iterations_in(run)
    assert sorted(path.name for path in run.glob("hf_*")) == [f"hf_{iteration:07d}" for iteration in iterations]
    export(run, tmp_path / "hf", iteration=6)
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert sorted(path.name for path in (run / "hf_0000006").iterdir()) == files
    for file in files:
        if file != "metrics.json":
            assert (run / "hf_0000006" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file
