"""A LoRA run in one process, and what is exported of it: the base stays, the adapter is the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mcore.backend import parallel
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.data.prepare.build import build_datasets
from mcore.errors import ConfigError
from mcore.train.base import open_base
from mcore.train.checkpoint import Position
from mcore.train.loop import Loop
from mcore.train.methods import sft
from mcore.train.model import build_training
from mcore.train.run import train
from mcore.train.schedule import Schedule
from mcore.train.stop import StopRequest
from mcore.verify.verify import verify
from tests.tiny_models import tiny_hf_model
from tests.tiny_runs import make_base, saved_tensors, tiny_run, tiny_tokenizer

LORA: dict[str, Any] = {
    "tuner_type": "lora",
    "lora_rank": 4,
    "target_modules": ("all-linear", "all-embedding"),
    "lr": 0.01,
}
LAST = "iter_0000012"


def converted(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """The base checkpoint of a tiny model in a dtype, whose Hugging Face folder is beside it."""
    model, _ = tiny_hf_model(name, dtype=dtype)
    model.save_pretrained(folder / f"hf-{name}")
    tiny_tokenizer().save_pretrained(folder / f"hf-{name}")
    convert(folder / f"hf-{name}", folder / name, make_vocab_size_divisible_by=128)
    return folder / name


@pytest.mark.parametrize(("torch_dtype", "whole"), [("float32", ()), ("bfloat16", ()), ("bfloat16", ("lm_head",))])
def test_steps_leave_the_frozen_weights_as_they_are(tmp_path: Path, torch_dtype: str, whole: tuple[str, ...]) -> None:
    make_base(tmp_path / "base", "llama")
    run = tiny_run(tmp_path, torch_dtype=torch_dtype, modules_to_save=whole, train_iters=4, **LORA)
    (tmp_path / "run").mkdir()
    base = open_base(tmp_path / "base", run)
    with parallel_processes(Layout()):
        data, validation = build_datasets(run.data, "sft", base.hf)
        schedule = Schedule.from_config(run.train, data)
        training = build_training(run.train, schedule, base, Layout(), has_weights=True)
        (module,) = training.modules
        sft.prepare(module, run.train)
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        loop = Loop(
            config=run.train,
            schedule=schedule,
            layout=Layout(),
            output=tmp_path / "run",
            training=training,
            forward_step=sft.forward_step,
            data=data,
            validation=validation,
            device=parallel.device(),
            stop=StopRequest(),
            hf_config=base.hf_config,
        )
        loop.run(Position())
        after = dict(module.named_parameters())
        changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
        assert changed == {name for name in after if ".lora." in name} | ({"output_layer.weight"} if whole else set())
        assert all(after[name].dtype == getattr(torch, torch_dtype) for name in changed)


@pytest.mark.parametrize(
    ("name", "dtype", "whole"),
    [
        ("llama", "bfloat16", ()),
        ("llama", "bfloat16", ("lm_head", "model.norm")),
        ("qwen3_tied", "float32", ("input_layernorm",)),
    ],
)
def test_what_is_exported_is_proven_and_is_what_peft_merges(
    tmp_path: Path, name: str, dtype: str, whole: tuple[str, ...]
) -> None:
    torch_dtype = getattr(torch, dtype)
    base = converted(tmp_path, name, torch_dtype)
    targets = ("all-linear",) if name == "qwen3_tied" else LORA["target_modules"]
    with parallel_processes(Layout()):
        settings = {**LORA, "target_modules": targets, "modules_to_save": whole}
        train(tiny_run(tmp_path, torch_dtype=dtype, **settings), base, tmp_path / "run")
    saved = saved_tensors(tmp_path / "run" / LAST)
    weights = {key for key in saved if "optimizer." not in key}
    learnt_whole = {key for key in weights if ".lora_" not in key}
    assert bool(learnt_whole) == bool(whole)
    ends = tuple(f"{own}.weight" for own in whole)
    assert weights and all(key.endswith(ends) for key in learnt_whole), "the base is in the checkpoint"
    moments = {key for key in saved if "optimizer." in key and torch.is_floating_point(saved[key])}
    assert all(saved[key].dtype == torch.float32 for key in moments)

    export(tmp_path / "run", tmp_path / "out", base=base)
    report = verify(tmp_path / "out", tmp_path / "run", tmp_path / "proof", base=base)
    assert report.passed and not report.structural.findings
    before, after = (
        load_file(tmp_path / f"hf-{name}" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    adapted = {key.split(".lora_")[0] + ".weight" for key in weights - learnt_whole} | learnt_whole
    assert {key for key in after if not torch.equal(before[key], after[key])} == adapted
    assert all(after[key].dtype == torch_dtype for key in after)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / f"hf-{name}", dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    merged = with_adapter.merge_and_unload().state_dict()
    for key, tensor in after.items():
        rounded = merged[key].to(torch_dtype).float()
        one_unit = torch.finfo(torch_dtype).eps * merged[key].abs() + 1e-6  # PEFT computes in fp32, the export in fp64
        assert ((tensor.float() - rounded).abs() <= one_unit).all(), key


def test_the_proof_sees_other_weights_and_another_adapter(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **LORA), tmp_path / "base", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", base=tmp_path / "base")
    file, adapter = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    whole, key = load_file(file), "model.layers.1.self_attn.k_proj.weight"
    for path, tensors, changed in (
        (file, whole, key),
        (adapter, load_file(adapter), "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
    ):
        good = path.read_bytes()
        tensors[changed][0, 0] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})
        report = verify(tmp_path / "out", tmp_path / "run", tmp_path / "proof", base=tmp_path / "base", overwrite=True)
        assert not report.structural.passed
        assert [finding.kind for finding in report.structural.findings] == ["differs"]
        assert report.structural.findings[0].tensor == changed.removeprefix("base_model.model.")
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ("all-linear", "all-embedding"), "modules_to_save": ("lm_head",)}),
        ("qwen3_moe", {"target_modules": ("all-linear", "all-router"), "modules_to_save": ("norm",)}),
        ("deepseek_v3", {"target_modules": ("experts.linear_fc1", "experts.linear_fc2", "kv_b_proj", "o_proj")}),
    ],
)
def test_an_adapter_by_itself_is_proven_on_top_of_the_base(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    base = converted(tmp_path, name, torch.float32)
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **(LORA | settings)), base, tmp_path / "run")
    metrics = export(tmp_path / "run", tmp_path / "out", base=base, merge_lora=False)
    names = ["adapter_config.json", "adapter_model.safetensors", "metrics.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    folders = (tmp_path / f"hf-{name}", tmp_path / "run", tmp_path / "proof")
    report = verify(*folders, base=base, adapter=tmp_path / "out")
    assert report.passed, report
    # Not the adapter that was trained: the bits tell, and so do the logits.
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = next(key for key in tensors if key.endswith("o_proj.lora_B.weight"))
    tensors[changed] *= 3
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify(*folders, base=base, adapter=tmp_path / "out", overwrite=True)
    assert [finding.tensor for finding in report.structural.findings] == [changed.removeprefix("base_model.model.")]
    assert report.numerical is not None and not report.numerical.passed


def test_an_adapter_that_peft_does_not_read_whole_is_no_proof(tmp_path: Path) -> None:
    """PEFT takes the MLP of a dense layer for an expert's; it warns, and goes on with a matrix that does nothing."""
    base = converted(tmp_path, "deepseek_v3", torch.float32)
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **LORA | {"target_modules": ("all-linear",)}), base, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", base=base, merge_lora=False)
    hf, run, proof = tmp_path / "hf-deepseek_v3", tmp_path / "run", tmp_path / "proof"
    report = verify(hf, run, proof, base=base, adapter=tmp_path / "out")
    assert not report.passed
    with pytest.raises(ConfigError) as error:
        report.raise_if_failed()
    assert "PEFT" in str(error.value)


def test_an_adapter_is_only_exported_of_a_lora_run_and_as_it_was_trained(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, train_iters=4), tmp_path / "base", tmp_path / "full")
    with pytest.raises(ConfigError) as error:
        export(tmp_path / "full", tmp_path / "out", merge_lora=False, torch_dtype="float16")
    assert "expected the checkpoint of a LoRA run, found whole weights" in str(error.value)
    assert "torch_dtype: expected auto" in str(error.value)


def test_adapters_are_of_no_use_without_their_base(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    make_base(tmp_path / "other", "llama_linear")
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **LORA), tmp_path / "base", tmp_path / "run")
        train(tiny_run(tmp_path, train_iters=4), tmp_path / "base", tmp_path / "full")
    for checkpoint, base, what in (
        ("run", None, "base: expected the checkpoint that the LoRA run started from, found none"),
        ("run", "full", "expected the weights that the LoRA run started from, found others"),
        ("full", "base", "base: expected none, as the checkpoint holds whole weights"),
    ):
        with pytest.raises(ConfigError) as error:
            export(tmp_path / checkpoint, tmp_path / "out", base=None if base is None else tmp_path / base)
        assert what in str(error.value)
        assert not (tmp_path / "out").exists()


def test_a_run_starts_from_the_adapter_of_another(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    settings = {**LORA, "lora_dropout": 0.0}
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **settings), tmp_path / "base", tmp_path / "first")
    export(tmp_path / "first", tmp_path / "out", base=tmp_path / "base")
    start_from = {"adapter_load": str(tmp_path / "out" / "adapter"), "train_iters": 4, "lr": 1e-3}
    with parallel_processes(Layout()):
        train(tiny_run(tmp_path, **{**settings, **start_from}), tmp_path / "base", tmp_path / "second")
    first, second = (
        [
            record["validation_loss"]
            for record in map(json.loads, (tmp_path / run / "metrics.jsonl").open())
            if "validation_loss" in record
        ]
        for run in ("first", "second")
    )
    assert second[0] == first[-1]
