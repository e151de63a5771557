import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.bridge.hf_headers import read_headers
from mcore.child import run_as_child
from mcore.errors import CheckpointError, ConfigError, PrecisionError, SourceError, error_from_json
from mcore.verify.__main__ import app
from mcore.verify.mutants.tiny_models import write_tiny_model
from mcore.verify.report import read_report
from mcore.verify.verify import _noise_dtype, verify

DOWN0 = "model.layers.0.mlp.down_proj.weight"
FILES = ["metrics.json", "report.json", "report.md"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_right_conversion_passes(qwen3, tmp_path):
    report = verify(qwen3.hf, qwen3.mcore, tmp_path / "out", num_prompts=3, max_prompt_tokens=40)
    assert report.passed
    assert names(tmp_path / "out") == FILES
    assert read_report(tmp_path / "out") == report
    logits = report.numerical
    assert [(prompt.prompt, prompt.num_tokens) for prompt in logits.prompts] == [(f"seeded_{i}", 40) for i in range(3)]
    assert 0 < logits.relative_error < 2e-5
    assert all(prompt.top1_agreement == 1 for prompt in logits.prompts)
    layers = [f"layers.{number}.{part}" for number in range(2) for part in ("attention", "mlp")]
    assert [point.point for point in logits.points] == ["embedding", *layers, "final_norm", "head"]
    assert all(point.relative_error < 2e-5 for point in logits.points)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["passed"] and metrics["relative_error"] == logits.relative_error


def test_an_export_passes_with_and_without_a_cast(llama_tied, tmp_path):
    export(llama_tied.mcore, tmp_path / "auto")
    assert verify(tmp_path / "auto", llama_tied.mcore, tmp_path / "out").passed
    export(llama_tied.mcore, tmp_path / "bf16", torch_dtype="bfloat16")
    report = verify(tmp_path / "bf16", llama_tied.mcore, tmp_path / "out_bf16")
    assert report.passed
    assert report.numerical.rounded_to == "bfloat16"
    assert "rounded to bfloat16 first" in (tmp_path / "out_bf16" / "report.md").read_text()


def test_an_export_that_rounds_otherwise_is_stopped(llama_tied, tmp_path):
    def through_float16(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.half().bfloat16()

    hf = llama_tied.changed_hf(tmp_path / "hf", through_float16)
    report = verify(hf, llama_tied.mcore, tmp_path / "out")
    assert {finding.kind for finding in report.structural.findings} == {"differs"}
    assert not report.numerical.passed


def test_a_wrong_tensor_is_stopped_and_reported_whole(qwen3, tmp_path):
    """The command as the pipeline runs it: exit status, typed error, and the report's folder all the same."""

    def change(tensors):
        tensors[DOWN0][3, 4] += 0.5

    hf = qwen3.changed_hf(tmp_path / "hf", change)
    done = subprocess.run(
        [sys.executable, "-m", "mcore.verify", "--hf", hf, "--mcore", qwen3.mcore, "--output", tmp_path / "out"],
        env=os.environ | {"MCORE_FLOWS_ERROR_FILE": str(tmp_path / "error.json")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and (tmp_path / "out" / "report.md").is_file()
    error = error_from_json((tmp_path / "error.json").read_text())
    assert type(error).__name__ == "PrecisionError"
    assert error.problems[0].subject == f"{DOWN0} (differs)"
    assert "the first part that differs is layers.0.mlp" in str(error)
    assert names(tmp_path / "out") == FILES
    report = read_report(tmp_path / "out")
    assert not report.passed and not report.structural.passed and not report.numerical.passed
    assert not list(tmp_path.glob(".out*"))


def test_a_misread_config_is_stopped_by_the_logits_alone(qwen3, tmp_path):
    mcore = copy_of(qwen3.mcore, tmp_path)
    change_config(mcore / "hf", rms_norm_eps=1e-5)
    report = verify(qwen3.hf, mcore, tmp_path / "out")
    assert report.structural.passed
    assert not report.numerical.passed
    assert report.numerical.first_bad_point == "layers.0.attention"


def test_nan_on_both_sides_never_passes(qwen3, tmp_path):
    def nan(key, *place):
        def change(tensors):
            tensors[key][place] = float("nan")

        return change

    hf = qwen3.changed_hf(tmp_path / "hf", nan(DOWN0, 0, 0))
    mcore = copy_of(qwen3.mcore, tmp_path, weights=False)
    qwen3.changed_release(mcore / "release", nan("decoder.layers.mlp.linear_fc2.weight", 0, 0, 0))
    report = verify(hf, mcore, tmp_path / "out")
    assert [finding.kind for finding in report.structural.findings] == ["not finite", "not finite"]
    assert "NaN" in report.numerical.not_loaded[0]
    assert not report.passed


def test_weights_of_another_shape_are_reported_without_logits(qwen3, tmp_path):
    mcore = copy_of(qwen3.mcore, tmp_path, weights=False)
    qwen3.changed_release(mcore / "release", lambda tensors: tensors.pop("output_layer.weight"))
    report = verify(qwen3.hf, mcore, tmp_path / "out")
    assert report.numerical is None
    assert [(f.tensor, f.kind) for f in report.structural.findings] == [("output_layer.weight", "missing")]
    assert names(tmp_path / "out") == FILES


def test_wrong_input_is_refused_before_anything_is_written(qwen3, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="in the way"):
        verify(qwen3.hf, qwen3.mcore, tmp_path / "there")
    with pytest.raises(SourceError, match=r"config\.json"):
        verify(tmp_path / "nowhere", qwen3.mcore, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        verify(qwen3.hf, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="iter_0000007"):
        verify(qwen3.hf, qwen3.mcore, tmp_path / "out", iteration=7)
    assert names(tmp_path) == ["there"]


def copy_of(checkpoint, folder, *, weights=True):
    """The checkpoint with config files of its own; its weights are linked."""
    copy = folder / "mcore"
    copy.mkdir()
    (copy / "hf").mkdir()
    for path in (checkpoint / "hf").iterdir():
        (copy / "hf" / path.name).write_bytes(path.read_bytes())
    (copy / "latest_checkpointed_iteration.txt").write_text("release")
    if weights:
        (copy / "release").symlink_to(checkpoint / "release")
    return copy


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_model_in_bfloat16_is_also_compared_by_its_noise(tmp_path):
    hf = write_tiny_model(tmp_path / "fp32", "qwen3", 3)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    convert(hf, tmp_path / "mcore")
    report = verify(hf, tmp_path / "mcore", tmp_path / "out", against_peers=True)
    assert report.passed
    assert report.noise.dtype == "bfloat16"
    assert 1e-3 < report.noise.hf_noise < 0.1
    assert 0.8 < report.noise.ratio < 1.25
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Logits in bfloat16 (T2): as near" in page
    assert "Megatron-SWIFT" in page
    noisier = verify(hf, tmp_path / "mcore", tmp_path / "strict", max_noise_ratio=0.5)
    assert not noisier.passed and noisier.numerical.passed
    with pytest.raises(PrecisionError, match=r"logits in bfloat16.*ratio .*gate 0\.5"):
        noisier.raise_if_failed()
    assert verify(hf, tmp_path / "mcore", tmp_path / "off", dtype="float32").noise is None
    change_config(tmp_path / "mcore" / "hf", rms_norm_eps=1e-2)
    wrong = verify(hf, tmp_path / "mcore", tmp_path / "wrong")
    assert not wrong.numerical.passed and wrong.noise is None


def own_copy(hf, folder):
    """A copy of a Hugging Face folder that a test may damage."""
    return Path(shutil.copytree(hf, folder))


def test_prompts_are_no_longer_than_the_model_takes(qwen3, tmp_path):
    hf = own_copy(qwen3.hf, tmp_path / "hf")
    change_config(hf, max_position_embeddings=24)
    report = verify(hf, qwen3.mcore, tmp_path / "out", num_prompts=2, max_prompt_tokens=40)
    assert report.passed and [prompt.num_tokens for prompt in report.numerical.prompts] == [24, 24]


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float16", "auto", "float16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float32"),
        ("float8_e4m3fn", "auto", "bfloat16"),
        ("float32", "float16", "float16"),
    ],
)
def test_noise_is_compared_in_the_dtype_of_most_of_the_bytes(tmp_path, stored, asked, expected):
    weights = {"most": torch.zeros(64, 64).to(getattr(torch, stored)), "few": torch.zeros(8)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert _noise_dtype(read_headers(tmp_path), asked) == expected


def test_a_model_that_transformers_loads_and_can_not_run_is_named(qwen3, tmp_path):
    hf = own_copy(qwen3.hf, tmp_path / "hf")
    num_layers = json.loads((hf / "config.json").read_text())["num_hidden_layers"]
    change_config(hf, layer_types=["sliding_attention"] * num_layers)
    report = verify(hf, qwen3.mcore, tmp_path / "out")
    assert report.structural.passed and report.numerical is None and not report.passed
    with pytest.raises(ConfigError, match=r"compared by their logits(.|\n)*can't run the model.*Qwen3ForCausal"):
        report.raise_if_failed()


@pytest.fixture
def command(monkeypatch, capfd):
    """Run the command as a stage process does; gives its exit status and what it says."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mcore.verify", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_as_child(app)
        return ended.value.code, capfd.readouterr().err

    return run


@pytest.mark.parametrize("differs", [True, False])
def test_what_lies_on_disk_is_told_although_the_tokenizer_does_not_load(qwen3, tmp_path, command, differs):
    hf = own_copy(qwen3.hf, tmp_path / "hf")
    (hf / "tokenizer.json").write_text("{")
    if differs:
        tensors = load_file(hf / "model.safetensors")
        tensors[DOWN0][3, 4] += 0.5
        tensors["model.norm.weight"][0] += 0.5
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    status, said = command("--hf", hf, "--mcore", qwen3.mcore, "--output", tmp_path / "out")
    assert status == (3 if differs else 2) and "Traceback" not in said
    assert "logits were not compared: found the tokenizer can't be loaded" in said
    assert (f"{DOWN0} (differs)" in said) == ("model.norm.weight (differs)" in said) == differs
    assert names(tmp_path / "out") == FILES
    report = read_report(tmp_path / "out")
    assert not report.passed and report.numerical is None and len(report.structural.findings) == 2 * differs
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.startswith("# Verification: FAILED")
    assert f"(T0): {'NOT EQUAL' if differs else 'equal'}" in page
    assert "## Logits: not compared\n\n* the tokenizer can't be loaded: " in page
    assert not json.loads((tmp_path / "out" / "metrics.json").read_text())["passed"]


def test_folders_that_hold_nothing_are_all_named_with_status_2(tmp_path, command):
    for name in ("hf", "mcore"):
        (tmp_path / name).mkdir()
    status, said = command("--hf", tmp_path / "hf", "--mcore", tmp_path / "mcore", "--output", tmp_path / "out")
    assert status == 2 and "Traceback" not in said
    problems = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(problems) == 3 and "config.json" in said and "model.safetensors" in said
    assert "latest_checkpointed_iteration.txt is missing" in said
    assert names(tmp_path) == ["hf", "mcore"]
