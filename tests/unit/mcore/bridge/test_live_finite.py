"""Weights that are not finite, in the files or in the dtype that they are cast to: live, and in an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.live import load_safetensors
from mcore.errors import CheckpointError, ConversionError
from tests.hf_folders import weights_of, write_hf_folder
from tests.tiny_models import PADDED_VOCAB_SIZE

UP, VALUE = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.v_proj.weight"


def write(folder: Path, number: float) -> Path:
    write_hf_folder(folder, "llama")
    weights = load_file(folder / "model.safetensors")
    weights[UP][3, 4] = weights[VALUE][5, 6] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def load() -> Iterator[Callable[[Path, torch.dtype], None]]:
    def into_a_model(hf: Path, dtype: torch.dtype) -> None:
        options = {"layout": Layout(), "backend": "torch", "params_dtype": dtype}
        model = build_model(read_hf_config(hf), padded_vocab_size=PADDED_VOCAB_SIZE, **options)
        load_safetensors([model], hf)

    with parallel_processes(Layout()):
        yield into_a_model


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_does_not_get_into_a_model(tmp_path: Path, load: Callable, number: float) -> None:
    with pytest.raises(CheckpointError, match="no finite numbers") as caught:
        load(write(tmp_path / "hf", number), torch.float32)
    assert [problem.subject for problem in caught.value.problems] == [
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.2.self_attention.linear_qkv.weight",
    ]


def test_what_is_too_large_for_a_model_is_named(tmp_path: Path, load: Callable) -> None:
    hf = write(tmp_path / "hf", -1e6)
    load(hf, torch.bfloat16)
    with pytest.raises(CheckpointError, match="too large for the model's dtype") as caught:
        load(hf, torch.float16)
    assert [problem.subject for problem in caught.value.problems] == [f"hf {UP}", f"hf {VALUE}"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_too_large_for_an_export_is_named_and_nothing_is_written(tmp_path: Path, num_workers: int) -> None:
    convert(write(tmp_path / "hf", 1e6), tmp_path / "mcore")
    with pytest.raises(ConversionError, match="too large") as caught:
        export(tmp_path / "mcore", tmp_path / "back", torch_dtype="float16", num_workers=num_workers)
    assert [problem.subject for problem in caught.value.problems] == [f"hf {UP}", f"hf {VALUE}"]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "mcore"}
    export(tmp_path / "mcore", tmp_path / "back", torch_dtype="bfloat16", num_workers=num_workers)
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "back").values())
