"""Adapters on a GPU, in both backends. Skips by itself where there is no CUDA, or no Transformer Engine.

    PYTHONPATH=. python -m pytest tests/gpu/test_lora_gpu.py

The same base, data and starting matrices: backends differ by rounding alone. Transformer Engine multiplies fp32
matrices in TF32, unless NVIDIA_TF32_OVERRIDE=0 tells cuBLAS not to: with it set here, the bound is the tight one.

B batch, S sequence, V vocabulary
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.backend.specs import Backend
from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.metrics import read_metrics
from mcore.train.run import train
from mcore.train.tuners.install import Adapters, install_adapters
from mcore.train.tuners.options import LoraOptions
from mcore.verify.verify import verify
from tests.gpu.test_backend_gpu import HAVE_TE, IDS_BS, MARGIN, POSITIONS_BS, TE, relative_error, tf32
from tests.lora_reference import Lora, random_matrices
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model
from tests.tiny_runs import make_base, recorded, tiny_run, tiny_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEEDS_TE = pytest.mark.skipif(not HAVE_TE, reason="needs transformer_engine")
IS_EXACT = os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
BOUNDS = {"float32": 1e-5 if IS_EXACT else 1e-2, "bfloat16": 1e-2}
CASES = {
    "llama": ("all-linear", "all-embedding"),
    "qwen3_tied": ("q_proj", "v_proj", "mlp.gate_proj"),
    "qwen3_moe": ("all-linear", "all-router"),
    "qwen2_moe": ("shared_experts.linear_fc1", "experts.linear_fc2"),
    "deepseek_v3": ("all-linear",),
}
LORA: dict[str, Any] = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "lr": 0.01}


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with parallel_processes(Layout()) as device:
        yield device


def options(name: str) -> LoraOptions:
    return LoraOptions(CASES[name], lora_rank=4, lora_alpha=6.0, use_rslora=True)


def base_for_adapters(name: str, backend: Backend, dtype: torch.dtype, *, norms_apart: bool = True) -> torch.nn.Module:
    hf, config = tiny_hf_model(name)
    module = build_model(
        config,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=Layout(),
        params_dtype=dtype,
        backend=backend,
        norms_apart=norms_apart,
    )
    fill(module, mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE))
    return module.eval()


def with_adapters(name: str, backend: Backend, dtype: torch.dtype) -> tuple[torch.nn.Module, Adapters]:
    """megatron's model with random adapters, the same for all."""
    hf, config = tiny_hf_model(name)
    module = base_for_adapters(name, backend, dtype)
    adapters = install_adapters([module], config, options(name), seed=1)
    matrices = random_matrices(options(name), hf, config)
    for pair in adapters.pairs:
        parts = [
            F.pad(matrices[key], (0, own.shape[1] - matrices[key].shape[1])).to(own.device)
            for key, _, own in pair.matrices()
        ]
        pair.fill(*parts)
    return module, adapters


@torch.no_grad()
def reference_logits(name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    hf, config = tiny_hf_model(name)
    adapted = Lora(hf, config, options(name), random_matrices(options(name), hf, config)).model
    logits: torch.Tensor = adapted.to(device, dtype)(input_ids=IDS_BS.to(device)).logits
    return logits


def typical(reference: torch.Tensor, found: torch.Tensor) -> float:
    """The median token's error: where a router rounds, some tokens go to other experts and far away."""
    error_BS = (reference - found.float().cpu()).abs().amax(-1)
    return (error_BS.median() / reference.std()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", TE])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft_and_of_the_merged_weights(name: str, backend: Backend, dtype: torch.dtype) -> None:
    exact = reference_logits(name, torch.float32, "cpu")
    with tf32():
        bound = max(MARGIN * typical(exact, reference_logits(name, dtype, "cuda")), 2e-5)
    module, adapters = with_adapters(name, backend, dtype)
    plain = base_for_adapters(name, backend, dtype)
    vocab = exact.shape[-1]
    found = [model(IDS_BS.cuda(), POSITIONS_BS.cuda(), None)[..., :vocab] for model in (plain, module)]
    adapters.merge(lambda target: dtype)
    merged = module(IDS_BS.cuda(), POSITIONS_BS.cuda(), None)[..., :vocab]
    assert typical(exact, found[0]) > 0.05, "the adapters add next to nothing"
    assert typical(exact, found[1]) < bound
    assert typical(exact, merged) < bound


@NEEDS_TE
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_norms_apart_change_neither_keys_nor_logits(name: str) -> None:
    """A base for adapters takes the same checkpoint as any other model, to the last key."""
    logits, keys = [], []
    for norms_apart in (False, True):
        module = base_for_adapters(name, "transformer_engine", torch.bfloat16, norms_apart=norms_apart)
        keys.append({entry.key for entry in module.sharded_state_dict().values() if "_extra_state" not in entry.key})
        with torch.no_grad():
            logits.append(module(IDS_BS.cuda(), POSITIONS_BS.cuda(), None)[..., :250].float().cpu())
    assert keys[0] == keys[1]
    assert typical(logits[0], logits[1]) < 1e-2


@NEEDS_TE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3_tied"])
def test_engine_learns_what_torch_does_and_goes_on(tmp_path: Path, name: str, dtype: str) -> None:
    make_base(tmp_path / "base", name)
    settings = LORA | {"torch_dtype": dtype, "target_modules": CASES[name], "save_steps": 6}
    losses = {}
    for backend in ("torch", "transformer_engine"):
        train(tiny_run(tmp_path, backend=backend, **settings), tmp_path / "base", tmp_path / backend)
        losses[backend] = recorded(read_metrics(tmp_path / backend / "metrics.jsonl"), "loss")
    assert losses["torch"][0] > losses["torch"][-1] + 0.01
    assert losses["transformer_engine"] == pytest.approx(losses["torch"], abs=BOUNDS[dtype])

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "transformer_engine", resumed)
    shutil.rmtree(resumed / "iter_0000012")
    (resumed / "latest_checkpointed_iteration.txt").write_text("6")
    (resumed / "metrics.json").unlink()
    train(tiny_run(tmp_path, backend="transformer_engine", **settings), tmp_path / "base", resumed)
    again = recorded(read_metrics(resumed / "metrics.jsonl"), "loss")
    assert again == pytest.approx(losses["transformer_engine"], abs=BOUNDS[dtype])


@NEEDS_TE
def test_experts_learn_what_torchs_do(tmp_path: Path) -> None:
    """All experts at once, against one by one, in bf16."""
    make_base(tmp_path / "base", "qwen3_moe")
    settings = LORA | {"torch_dtype": "bfloat16", "target_modules": CASES["qwen3_moe"], "lr": 1e-3}
    losses = []
    for backend in ("torch", "transformer_engine"):
        train(tiny_run(tmp_path, backend=backend, **settings), tmp_path / "base", tmp_path / backend)
        losses.append(recorded(read_metrics(tmp_path / backend / "metrics.jsonl"), "loss"))
    # Rounding sends some tokens to other experts, as in test_moe_gpu.py.
    assert losses[1] == pytest.approx(losses[0], abs=5e-2)


@NEEDS_TE
def test_what_engine_saved_loads_in_peft_and_leaves_the_base_alone(tmp_path: Path) -> None:
    hf, _ = tiny_hf_model("llama", dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "hf")
    tiny_tokenizer().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "base", make_vocab_size_divisible_by=128)
    settings = LORA | {"torch_dtype": "bfloat16", "target_modules": ("all-linear",)}
    train(tiny_run(tmp_path, backend="transformer_engine", **settings), tmp_path / "base", tmp_path / "run")

    export(tmp_path / "run", tmp_path / "out", base=tmp_path / "base")
    report = verify(tmp_path / "out", tmp_path / "run", tmp_path / "proof", base=tmp_path / "base")
    assert report.passed and not report.structural.findings
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=IDS_BS).logits
        expected = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(input_ids=IDS_BS).logits
        found = merged(input_ids=IDS_BS).logits
    assert relative_error(expected, plain) > 0.05, "nothing was learnt"
    assert relative_error(expected, found) < 5e-2  # the merged weights are rounded to bf16
    untouched = {key for key in before if "norm" in key or "embed" in key or "lm_head" in key}
    assert untouched and all(torch.equal(merged.state_dict()[key], before[key]) for key in untouched)
