"""megatron-core 0.16 and 0.19 read what we convert, and whatever they save, in whatever spelling, comes back.

The models in here are megatron-core's own (`other_megatron_cases.py`), so these are the checkpoints of other tools.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.export import export
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.plan import global_shape, steps_of
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.parallel.bridge_cases import compare_shards
from tests.parallel.launch import REPOSITORY, run_torchrun
from tests.parallel.newer_megatron import newer_megatron
from tests.tiny_models import PADDED_VOCAB_SIZE
from tests.tiny_mtp import write_mtp_folder

pytestmark = pytest.mark.layouts

DENSE = {"llama_bias": torch.float32, "qwen2": torch.bfloat16, "qwen3_tied": torch.bfloat16}
FURTHER = "deepseek_v3_mtp"
EXPERTS = {"qwen2_moe": torch.bfloat16, "qwen2_moe_mixed": torch.bfloat16, FURTHER: torch.float32}
"""All layers, some layers, and with multi-latent attention, layers for further tokens and a router's fp32 bias."""
MODELS = DENSE | EXPERTS
VERSIONS = ("0.16", "0.19")
SPELLINGS = ("engine", "local", "single")
SAVED = [
    (name, layout, spelling)
    for name in MODELS
    for layout in (("tp2", "pp2", "ep2") if name in EXPERTS else ("tp2", "pp2"))
    for spelling in SPELLINGS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    for name, dtype in MODELS.items():
        if name == FURTHER:
            config = write_mtp_folder(folder / name / "hf", "deepseek_v3", dtype=dtype)
        else:
            config = write_hf_folder(folder / name / "hf", name, dtype=dtype)
        convert(folder / name / "hf", folder / name / "mcore", make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
        (folder / name / "mcore" / "release").rename(folder / name / "release")
        (folder / name / "config.json").write_text(json.dumps(config))
        torch.save(mcore_tensors(weights_of(folder / name / "hf"), config), folder / name / "expected.pt")
    return folder


def mcore_tensors(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of Hugging Face files as megatron names and stacks them, made by the tables' rows."""
    dims = dims_of(config, make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    tensors: dict[str, Tensor] = {}
    for step in steps_of(family_of_config(config), dims):
        parts = [weights[name] for name in step.hf_names]
        whole = tensors.setdefault(step.mcore_key, parts[0].new_zeros(global_shape(step, dims)))
        whole[step.index] = step.rule.to_mcore(parts, dims)
    return tensors


@pytest.fixture(scope="module", params=VERSIONS)
def saved(folder: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """Every model was read at its strictest, compared bit for bit, and saved, on two processes."""
    path = [str(REPOSITORY)] if request.param == "0.16" else [str(newer_megatron()), str(REPOSITORY)]
    run_torchrun(
        2,
        Path(__file__).with_name("other_megatron_cases.py"),
        folder,
        folder=folder,
        timeout_s=600,
        env={"PYTHONPATH": os.pathsep.join(path)},
    )
    return folder, request.param


@pytest.mark.parametrize(("name", "layout", "spelling"), SAVED)
def test_what_they_save_is_exported(
    saved: tuple[Path, str], tmp_path: Path, name: str, layout: str, spelling: str
) -> None:
    folder, version = saved
    iteration = folder / name / f"{version}-{layout}-{spelling}" / "iter_0000005"
    stored = read_dist_tensors(iteration)
    assert (iteration / "common.pt").exists() == (version == "0.16")
    assert any(key.endswith("linear_fc1.weight_w") for key in stored) == (spelling == "single")
    assert export(iteration, tmp_path / "hf", hf=folder / name / "hf")["iteration"] == 5
    assert_same_weights(weights_of(tmp_path / "hf"), weights_of(folder / name / "hf"))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_what_they_save_is_loaded(saved: tuple[Path, str], name: str, spelling: str) -> None:
    folder, version = saved
    config, expected = read_hf_config(folder / name), torch.load(folder / name / "expected.pt")
    with parallel_processes(Layout()):
        model = build_model(
            config, padded_vocab_size=PADDED_VOCAB_SIZE, layout=Layout(), params_dtype=MODELS[name], backend="torch"
        )
        load_weights(model, folder / name / f"{version}-tp2-{spelling}" / "iter_0000005")
        assert sum(compare_shards(model, expected)) == sum(tensor.numel() for tensor in expected.values())
