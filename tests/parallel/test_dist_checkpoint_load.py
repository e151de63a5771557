"""Converted checkpoints are megatron-core's own, and its own can be exported.

Its loader, at its strictest, reads a conversion in any layout; what it saves in any layout comes back as the model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing
from safetensors.torch import save_file

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.export import export
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.parallel.bridge_cases import LAYOUTS, MODELS, check_load
from tests.parallel.launch import run_torchrun
from tests.tiny_models import PADDED_VOCAB_SIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mcore.bridge.convert.CHUNK_BYTES", 10_000)  # so that tensors come in several chunks
        for name, dtype in MODELS.items():
            write_hf_folder(folder / name / "hf", name, dtype=dtype)
            convert(folder / name / "hf", folder / name / "mcore", make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
            (folder / name / "mcore" / "release").rename(folder / name / "release")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_one_process_loads_it_bit_for_bit(folder: Path, name: str) -> None:
    with parallel_processes(Layout()):
        check_load(folder / name / "release", name, Layout())


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> Path:
    """Loads every model at TP2, PP2 and DP2, compares it bit for bit, and saves it again with its optimizer."""
    run_torchrun(2, Path(__file__).with_name("bridge_cases.py"), folder, folder=folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", LAYOUTS)
def test_two_processes_load_it_and_what_they_save_is_exported(
    two_processes: Path, tmp_path: Path, case: str, name: str
) -> None:
    model = two_processes / name
    checkpoint = shutil.copytree(model / case, tmp_path / "checkpoint")
    shutil.copytree(model / "mcore" / "hf", checkpoint / "hf")
    saved = read_dist_tensors(checkpoint / "iter_0000003")
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" in saved
    assert len(saved["decoder.layers.mlp.linear_fc2.weight"].chunks) == (8 if case == "tp2" else 4)
    export(checkpoint, tmp_path / "hf", iteration=3)
    assert_same_weights(weights_of(tmp_path / "hf"), weights_of(model / "hf"))


def test_the_common_state_is_plain(folder: Path) -> None:
    with parallel_processes(Layout()):
        common = dist_checkpointing.load_common_state_dict(str(folder / "qwen2" / "release"))
    assert common == {"iteration": 0, "checkpoint_version": 3.0}


def test_one_wrong_number_is_seen(folder: Path, tmp_path: Path) -> None:
    """The comparison itself can fail."""
    write_hf_folder(tmp_path / "hf", "qwen2", dtype=MODELS["qwen2"])
    weights = weights_of(tmp_path / "hf")
    weights["model.layers.3.self_attn.v_proj.bias"][-1] += 0.01
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "mcore", make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    with parallel_processes(Layout()), pytest.raises(AssertionError, match=r"linear_qkv\.bias"):
        check_load(tmp_path / "mcore" / "release", "qwen2", Layout())
