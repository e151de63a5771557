"""Quantised folders all the way: convert, both proofs, export; and everything that may be wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import read_hf_config
from mcore.errors import InputError
from mcore.select import select_checkpoint
from mcore.verify.further_tokens import ATTRIBUTE
from mcore.verify.structural import compare_on_disk
from mcore.verify.traces import load_hf_model
from tests.hf_folders import assert_same_weights, weights_of
from tests.quantised_folders import write_compressed_folder, write_fp8_folder, write_mxfp4_folder

CPU = torch.device("cpu")
UNQUANTISED = {"quantization_config", "dtype", "torch_dtype", "transformers_version"}


def structural(folder):
    config = read_hf_config(folder / "hf")
    chosen = select_checkpoint(folder / "mcore")
    return compare_on_disk(folder / "hf", chosen.path, family=family_of_config(config), dims=dims_of(config))


def damage(folder, change):
    """Change the one file's tensors in place."""
    file = folder / "hf" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def problems_of(folder):
    with pytest.raises(InputError) as caught:
        convert(folder / "hf", folder / "mcore")
    assert sorted(path.name for path in folder.iterdir()) == ["hf"]
    return [str(problem) for problem in caught.value.problems]


CASES = {
    "whole blocks": lambda hf: write_fp8_folder(hf, "qwen3_moe", block=(8, 8)),
    "blocks": lambda hf: write_fp8_folder(hf, "qwen3_moe"),
    "cut blocks": lambda hf: write_fp8_folder(hf, "qwen3", block=(40, 24)),
    "bf16 scales": lambda hf: write_fp8_folder(hf, "llama", scale_dtype=torch.bfloat16),
    "powers of two": lambda hf: write_fp8_folder(hf, "qwen3", scale_dtype=torch.float8_e8m0fnu),
    "further tokens": lambda hf: write_fp8_folder(hf, "deepseek_v3", has_further_layers=True),
    "128": lambda hf: write_fp8_folder(hf, "qwen2_tied", block=(128, 128)),
    "one scale": lambda hf: write_fp8_folder(hf, "llama_bias", block=None, is_static=True),
    "shards": lambda hf: write_fp8_folder(hf, "qwen3", max_shard_size="60KB"),
    "channel": lambda hf: write_compressed_folder(hf, "qwen3_moe"),
    "tensor": lambda hf: write_compressed_folder(hf, "llama", strategy="tensor"),
    "mxfp4": lambda hf: write_mxfp4_folder(hf, "gpt_oss"),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path, case, capfd):
    meant = CASES[case](tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mcore")
    if case == "one scale":
        assert "activation_scale is left out" in capfd.readouterr().err
    result = structural(tmp_path)
    assert result.passed, result.findings
    stored = weights_of(tmp_path / "hf")
    quantised = {name for name, tensor in stored.items() if tensor.dtype in (torch.float8_e4m3fn, torch.uint8)}
    assert set(result.dequantised) == {name for name in quantised if not name.endswith("_scales")} != set()
    export(tmp_path / "mcore", tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), meant)
    before, after = read_hf_config(tmp_path / "hf"), read_hf_config(tmp_path / "back")
    assert {k: v for k, v in before.items() if k not in UNQUANTISED} == {
        k: v for k, v in after.items() if k not in UNQUANTISED
    }
    assert "quantization_config" not in after and after["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["blocks", "cut blocks", "channel", "mxfp4", "further tokens"])
def test_the_model_that_the_proof_runs_holds_the_same_weights(tmp_path, case):
    CASES[case](tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    quantised, plain = load_hf_model(tmp_path / "hf", CPU), load_hf_model(tmp_path / "back", CPU)
    assert_same_weights(quantised.state_dict(), plain.state_dict())
    assert all(weight.dtype == torch.float32 for weight in quantised.parameters())
    further, of_plain = (getattr(model, ATTRIBUTE, None) for model in (quantised, plain))
    assert (further is None) == (of_plain is None) == (case != "further tokens")
    if further is not None:
        assert_same_weights(further.state_dict(), of_plain.state_dict())


@pytest.mark.parametrize(
    ("case", "dequantise"),
    [("whole blocks", FineGrainedFP8Config(dequantize=True)), ("mxfp4", Mxfp4Config(dequantize=True))],
)
def test_transformers_own_loader_has_the_same_weights(tmp_path, case, dequantise):
    CASES[case](tmp_path / "hf")
    ours = load_hf_model(tmp_path / "hf", CPU, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.bfloat16, quantization_config=dequantise, local_files_only=True
    )
    assert_same_weights(ours.state_dict(), theirs.state_dict())


def test_one_wrong_scale_is_seen_on_disk(tmp_path):
    write_fp8_folder(tmp_path / "hf", "qwen3")
    convert(tmp_path / "hf", tmp_path / "mcore")
    name = "model.layers.2.self_attn.o_proj.weight"
    damage(tmp_path, lambda tensors: tensors[f"{name}_scale_inv"][1, 2].mul_(1.01))
    (finding,) = structural(tmp_path).findings
    assert finding.tensor == name and finding.kind == "differs"
    assert "first at [32, 64]" in finding.detail


def test_scales_that_are_missing_left_over_or_misshapen_are_all_named(tmp_path):
    write_fp8_folder(tmp_path / "hf", "qwen3")
    place = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors):
        del tensors[f"{place}_scale_inv"]
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 1)
        tensors["model.layers.1.mlp.down_proj.weight_scale_inv"] = torch.ones(2, 3, dtype=torch.float64)
        tensors["model.norm.weight_scale_inv"] = torch.ones(1)

    damage(tmp_path, change)
    problems = problems_of(tmp_path)
    assert len(problems) == 4, problems
    text = "\n".join(problems)
    assert f"{place}_scale_inv: expected float32 or bfloat16 or float16 or float8_e8m0fnu [6, 2]" in text
    assert "found float32 [3, 1]" in text and "found float64 [2, 3]" in text
    assert "hf model.norm.weight_scale_inv: expected a row of the qwen3 table" in text


def test_mxfp4_scales_that_do_not_fit(tmp_path):
    write_mxfp4_folder(tmp_path / "hf", "gpt_oss")

    def change(tensors):
        del tensors["model.layers.0.mlp.experts.down_proj_scales"]
        name = "model.layers.1.mlp.experts.gate_up_proj_scales"
        tensors[name] = tensors[name][:, :, :1].contiguous()

    damage(tmp_path, change)
    text = "\n".join(problems_of(tmp_path))
    assert "model.layers.0.mlp.experts.down_proj_scales: expected uint8 [64, 3]" in text
    assert "model.layers.1.mlp.experts.gate_up_proj_scales: expected uint8 [192, 2]" in text


def test_numbers_that_are_not_finite_after_their_scale(tmp_path):
    write_fp8_folder(tmp_path / "hf", "qwen3")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] = torch.inf
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 4] = 0x7F

    damage(tmp_path, change)
    problems = problems_of(tmp_path)
    assert len(problems) == 2
    assert "layers.0.mlp.up_proj.weight" in problems[0] and "infinities, the first at [0, 0]" in problems[0]
    assert "1 NaN and 0 infinities, the first at [3, 4]" in problems[1]


@pytest.mark.parametrize(
    ("quantisation", "expected"),
    [
        ({"quant_method": "fp8"}, "weight_block_size: expected two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "found [128]"),
        ({"quant_method": "fp8", "weight_block_size": [32, True]}, "found [32, True]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 32]}, "found [0, 32]"),
        ({"quant_method": "compressed-tensors"}, "config_groups: expected the same symmetric 8-bit float weights"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}}, "num_bits"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method: expected one of fp8, mxfp4, compressed-tensors"),
        ({"quant_method": "mxfp4"}, "float8_e4m3fn"),
        ({}, "float8_e4m3fn"),
        (None, "float8_e4m3fn"),
        ("fp8", "quantization_config: expected an object"),
    ],
)
def test_a_config_that_does_not_say_how_weights_are_quantised(tmp_path, quantisation, expected):
    write_fp8_folder(tmp_path / "hf", "qwen3")
    config = read_hf_config(tmp_path / "hf") | {"quantization_config": quantisation}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert any(expected in problem for problem in problems_of(tmp_path))
