"""Training in bf16 leaves alone what it is not about: the routers' fp32 biases, and layers for further tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.select import iterations_in
from mcore.train.run import train
from tests.hf_folders import weights_of
from tests.tiny_mtp import write_mtp_folder
from tests.tiny_runs import tiny_run, tiny_tokenizer


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_they_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    write_mtp_folder(tmp_path / "hf", name, dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "base", make_vocab_size_divisible_by=128)
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, torch_dtype="bfloat16", lr=0.01), tmp_path / "base", tmp_path / "run")
    export(
        tmp_path / "run", tmp_path / "out", hf=tmp_path / "base" / "hf", iteration=iterations_in(tmp_path / "run")[-1]
    )
    before, after = weights_of(tmp_path / "hf"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key].to(before[key].dtype))}
    biases = {key for key in before if key.endswith("e_score_correction_bias")}
    copies = {
        key for key in before if key.endswith(("embed_tokens.weight", "shared_head.head.weight", "lm_head.weight"))
    }
    further = {key for key in before if key.startswith(("model.layers.4.", "model.layers.5."))} - copies
    assert same == biases | further
    assert all(after[key].dtype == torch.float32 for key in biases)
    assert torch.equal(after["model.layers.5.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(after["model.layers.5.shared_head.head.weight"], after["lm_head.weight"])
