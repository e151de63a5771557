"""The live route against the file route, bit for bit: what a job of several processes loads, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.bridge.hf_config import read_hf_config
from tests.hf_folders import write_hf_folder
from tests.parallel.launch import run_torchrun
from tests.parallel.live_cases import LAYOUTS, suits
from tests.quantised_folders import write_fp8_folder, write_mxfp4_folder
from tests.tiny_models import CLASSIFIERS, DENSE, LATENT_MODELS, MODELS, MOE, NORMED, PADDED_VOCAB_SIZE
from tests.tiny_mtp import write_mtp_folder

pytestmark = pytest.mark.layouts

ALL = {**MODELS, **DENSE, **CLASSIFIERS, **NORMED, **LATENT_MODELS, **MOE}
FAMILIES = {model_class.__name__: name for name, (model_class, *_) in reversed(ALL.items())}
"""The first model of each architecture."""
FURTHER = "deepseek_v3_mtp"
QUANTISED = {
    "qwen3_moe_fp8": lambda folder: write_fp8_folder(folder, "qwen3_moe", block=(40, 24)),
    "gpt_oss_mxfp4": lambda folder: write_mxfp4_folder(folder, "gpt_oss"),
}
NAMES = (*FAMILIES.values(), "llama_bias", "qwen3_tied", "qwen2_moe_mixed", "deepseek_v2_lite", FURTHER, *QUANTISED)
SHARD_GB = 0.0001
"""So small that every model has several files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family in both routes: converted, and exported again from that; loaded and saved by two and by four."""
    folder = tmp_path_factory.mktemp("live")
    for name in NAMES:
        model = folder / name
        if name == FURTHER:
            write_mtp_folder(model / "hf", "deepseek_v3")
        elif name in QUANTISED:
            QUANTISED[name](model / "hf")
        else:  # a router's bias is fp32 in megatron-core, as in the files that makers publish
            is_fp32 = name in LATENT_MODELS or name == "llama_bias"
            write_hf_folder(model / "hf", name, dtype=torch.float32 if is_fp32 else torch.bfloat16)
        convert(model / "hf", model / "mcore", make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
        export(model / "mcore", model / "file", max_shard_size_gb=SHARD_GB)
        (model / "mcore" / "release").rename(model / "release")
    for num_processes in LAYOUTS:
        script = Path(__file__).with_name("live_cases.py")
        run_torchrun(num_processes, script, folder, num_processes, SHARD_GB, folder=folder, timeout_s=900)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_what_a_job_writes_is_what_an_export_writes(folder: Path, name: str) -> None:
    model = folder / name
    config = read_hf_config(model / "hf")
    expected = [layout for of_number in LAYOUTS.values() for layout in of_number if suits(layout, config)]
    assert {"tp2", "tp2_etp1"} & set(expected) and "pp2" in expected
    files = sorted(path.name for path in (model / "file").iterdir())
    assert len([file for file in files if file.endswith(".safetensors")]) > 1
    for layout in expected:
        assert sorted(path.name for path in (model / layout).iterdir()) == files
        for file in files:
            if file != "metrics.json":
                assert (model / layout / file).read_bytes() == (model / "file" / file).read_bytes(), (layout, file)
