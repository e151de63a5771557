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
from mcore.bridge.adapters import read_adapter_weights
from mcore.bridge.export import export
from mcore.data.prepare.build import build_datasets
from mcore.metrics import read_metrics
from mcore.train.run import train
from mcore.train.tuners.options import LoraOptions
from mcore.train.tuners.pair import first_values
from mcore.train.tuners.targets import choose_targets
from tests.lora_reference import Lora, names, random_matrices, whole_names, write_adapter
from tests.parallel.launch import run_torchrun
from tests.parallel.lora_cases import RUNS, STEPS, TARGETS, lora_run, one_step
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
        model, config = make_base(folder / name, name)
        options = LoraOptions.of(lora_run(folder, name).train)
        write_adapter(folder / f"adapter-{name}", options, config, random_matrices(options, model, config))
        with parallel_processes(Layout()):
            train(lora_run(folder, name), folder / name, folder / f"one-{name}")
            train(one_step(folder, name), folder / name, folder / f"step-one-{name}")
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
    matrices |= {key: model.state_dict()[key] for key in whole_names(options, config)}
    lora = Lora(model, config, options, matrices)
    optimizers: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: optimizers.append(optimizer))
    data, _ = build_datasets(run.data, "sft", folder / name / "hf")
    losses = train_with_transformers(Learning(lora), run, data)
    hook.remove()
    # First what decays, then norms.
    keys = sorted(lora.parameters, key=lambda key: lora.parameters[key].dim() == 1)
    copies = [parameter for group in optimizers[-1].param_groups for parameter in group["params"]]
    moments = {key: optimizers[-1].state[copy] for key, copy in zip(keys, copies, strict=True)}
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
    saved = tensors_of(run / LAST)
    assert {key for key in saved if "optimizer." not in key} == set(wanted.matrices)
    for key, matrix in wanted.matrices.items():
        assert torch.allclose(without_padding(saved[key], matrix), matrix, atol=1e-4), key
        for moment in ("exp_avg", "exp_avg_sq"):
            of_peft = wanted.moments[key][moment]
            ours = without_padding(saved[f"optimizer.state.{moment}.{key}"], matrix)
            assert torch.allclose(ours, of_peft, rtol=1e-3, atol=1e-5 * max(1.0, of_peft.abs().max().item())), key


def tensors_of(iteration: Path) -> dict[str, Tensor]:
    return {re.sub(r"^chained_\d\.", "", key): value for key, value in saved_tensors(iteration).items()}


def without_padding(saved: Tensor, like: Tensor) -> Tensor:
    """What megatron pads the vocabulary with must not have learnt either."""
    cut = saved[tuple(slice(0, size) for size in like.shape)]
    assert saved.norm() == pytest.approx(cut.norm().item(), rel=1e-6)
    return cut


@pytest.fixture(scope="module")
def gradients(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Those that PEFT's model has of the first batch, with the adapter that the single steps start from."""
    found = {}
    for name in TARGETS:
        run = one_step(folder, name)
        model, config = tiny_hf_model(name)
        options = LoraOptions.of(run.train)
        lora = Lora(model, config, options, read_adapter_weights(folder / f"adapter-{name}"))
        data, _ = build_datasets(run.data, "sft", folder / name / "hf")
        train_with_transformers(Learning(lora), run, data)
        found[name] = {key: parameter.grad.clone() for key, parameter in lora.parameters.items()}
    return found


@pytest.mark.parametrize(("case", "name"), CASES)
def test_gradients_are_those_of_peft(
    folder: Path, gradients: Mapping[str, Mapping[str, Tensor]], case: str, name: str
) -> None:
    run = one_step(folder, name).train
    saved = tensors_of(folder / f"step-{case}-{name}" / "iter_0000001")
    wanted = gradients[name]
    assert {key for key in saved if "optimizer." not in key} == set(wanted)
    for key, of_peft in wanted.items():
        ours = without_padding(saved[f"optimizer.state.exp_avg.{key}"], of_peft) / (1 - run.adam_beta1)
        largest = of_peft.abs().max()
        assert largest > 0 or ".experts." in key, key
        assert torch.allclose(ours, of_peft, rtol=1e-4, atol=1e-5 * max(largest.item(), 1e-4)), key


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
        learns = any(part in key for part in ("proj", "embed", "lm_head", "norm"))
        assert learns or torch.equal(merged.state_dict()[key], before[key]), key
