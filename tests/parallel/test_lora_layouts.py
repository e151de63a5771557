"""Adapters learn in every layout what PEFT teaches them on transformers' model, gradients included."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.export import export
from mcore.metrics import read_metrics
from mcore.train.methods import sft
from mcore.train.run import train
from mcore.train.tuners.options import LoraOptions
from mcore.train.tuners.pair import first_values
from mcore.train.tuners.targets import choose_targets
from tests.lora_reference import Lora, names, random_matrices
from tests.parallel.launch import run_torchrun
from tests.parallel.lora_cases import RUNS, STEPS, TARGETS, lora_run
from tests.reference_training import train_with_transformers
from tests.tiny_models import tiny_hf_model
from tests.tiny_runs import make_base, recorded, saved_tensors

pytestmark = [pytest.mark.layouts, pytest.mark.timeout(1800)]

CASES = [("one", name) for name in TARGETS] + [run for runs in RUNS.values() for run in runs]
LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for name in TARGETS:
        make_base(folder / name, name)
        with parallel_processes(Layout()):
            train(lora_run(folder, name), folder / name, folder / f"one-{name}")
    for nproc in RUNS:
        run_torchrun(nproc, Path(__file__).with_name("lora_cases.py"), folder, folder=folder, timeout_s=600)
    return folder


@dataclass(frozen=True)
class Reference:
    losses: list[float]
    matrices: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]


class Learning:
    """A transformers model of which only the adapters are seen by who trains it."""

    def __init__(self, lora: Lora) -> None:
        self.lora, self.device = lora, torch.device("cpu")

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.lora.parameters.values())

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, **inputs: Any) -> Any:
        return self.lora.model(**inputs)


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Reference]:
    return {name: reference(folder, name) for name in TARGETS}


def reference(folder: Path, name: str) -> Reference:
    run = lora_run(folder, name)
    model, config = tiny_hf_model(name)
    options = LoraOptions.of(run.train)
    matrices = random_matrices(options, model, config)
    for target in choose_targets(options.target_modules, config):
        name_a, name_b = names(target)
        (rank, in_size), (out_size, _) = matrices[name_a].shape, matrices[name_b].shape
        first = first_values(target, rank, in_size, out_size, run.train.seed)
        matrices[name_a], matrices[name_b] = first["A"], first["B"]
    lora = Lora(model, config, options, matrices)
    optimizers: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: optimizers.append(optimizer))
    data, _ = sft.datasets(run.data, folder / name / "hf")
    losses = train_with_transformers(Learning(lora), run, data)
    hook.remove()
    (states,) = [list(group["params"]) for group in optimizers[-1].param_groups if group["params"]]
    moments = {key: optimizers[-1].state[parameter] for key, parameter in zip(lora.parameters, states, strict=True)}
    return Reference(losses, {key: parameter.detach() for key, parameter in lora.parameters.items()}, moments)


@pytest.mark.parametrize(("case", "name"), CASES)
def test_losses_matrices_and_moments_are_those_of_peft(
    folder: Path, references: Mapping[str, Reference], case: str, name: str
) -> None:
    wanted = references[name]
    run = folder / f"{case}-{name}"
    losses = recorded(read_metrics(run / "metrics.jsonl"), "loss")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    assert losses == pytest.approx(wanted.losses, abs=1e-5)
    saved = {re.sub(r"^chained_\d\.", "", key): value for key, value in saved_tensors(run / LAST).items()}
    assert {key for key in saved if "optimizer." not in key} == set(wanted.matrices)
    for key, matrix in wanted.matrices.items():
        ours = saved[key][:, : matrix.shape[1]]
        assert torch.allclose(ours, matrix, atol=1e-4), key
        for moment in ("exp_avg", "exp_avg_sq"):
            of_peft = wanted.moments[key][moment]
            ours = saved[f"optimizer.state.{moment}.{key}"][:, : matrix.shape[1]]
            assert torch.allclose(ours, of_peft, rtol=1e-3, atol=1e-5 * max(1.0, of_peft.abs().max().item())), key


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one_with_dropout_too(folder: Path, name: str) -> None:
    expected, found = (saved_tensors(folder / f"{run}-{name}" / LAST) for run in ("dropout", "resumed"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    before, after = (read_metrics(folder / f"{run}-{name}" / "metrics.jsonl") for run in ("dropout", "resumed"))
    for figure in ("loss", "validation_loss", "grad_norm", "lr", "consumed_tokens"):
        assert recorded(after, figure) == recorded(before, figure)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_adapter_of_tensor_and_pipeline_ranks_loads_with_peft(folder: Path, name: str) -> None:
    exported = folder / f"exported-{name}"
    export(folder / f"tp2_pp2-{name}", exported, base=folder / name)
    model, _ = tiny_hf_model(name)
    ids = torch.arange(60).reshape(2, 30)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = model(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(model, exported / "adapter")
    found = adapted(input_ids=ids).logits
    assert (found - fresh).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    assert ((merged(input_ids=ids).logits - found).abs().max() / found.std()).item() < 1e-5
    for key, tensor in adapted.merge_and_unload().state_dict().items():
        assert torch.allclose(merged.state_dict()[key], tensor, rtol=0, atol=1e-6), key
        assert "proj" in key or "embed" in key or torch.equal(merged.state_dict()[key], before[key]), key
