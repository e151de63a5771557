"""Packed samples are computed as if each were alone: nothing of one reaches another, and a run learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.packed import PackedSamples, positions_in_samples
from mcore.backend.parallel import parallel_processes
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.parallel.train_cases import back_to_first_checkpoint
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model
from tests.tiny_runs import make_base, recorded, saved_tensors, tiny_run

MODELS = ("llama", "qwen3_moe", "deepseek_v3", "gemma2", "gpt_oss", "ministral3")
"""Plain; experts; latents; windows with capped scores; sinks; queries that grow with their position."""
LENGTHS = (13, 30, 8)
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def trained(folder: Path, name: str, output: str, **options: Any) -> Path:
    if not (folder / name).exists():
        make_base(folder / name, name)
    with parallel_processes(Layout()):
        train(tiny_run(folder, train_iters=STEPS, **options), folder / name, folder / output)
    return folder / output


@pytest.mark.parametrize("name", [*MODELS[:3], *(pytest.param(name, marks=pytest.mark.layouts) for name in MODELS[3:])])
def test_packed_learns_what_padded_learns(folder: Path, name: str) -> None:
    packed, padded = (trained(folder, name, f"{name}-{packing}", packing=packing) for packing in (True, False))
    one, other = (read_metrics(run / "metrics.jsonl") for run in (padded, packed))
    assert recorded(one, "loss")[-1] < recorded(one, "loss")[0] - 1
    for figure in ("loss", "validation_loss"):
        assert recorded(other, figure) == pytest.approx(recorded(one, figure), abs=1e-5)
    for figure in ("lr", "consumed_tokens", "consumed_samples", "expert_tokens"):
        assert recorded(other, figure) == recorded(one, figure)
    expected, found = (saved_tensors(run / f"iter_{STEPS:07d}") for run in (padded, packed))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=1e-4, rtol=0), key


def test_short_rows_learn_the_same(folder: Path) -> None:
    """Rows that hold two samples at most, several a step."""
    long = trained(folder, "llama", "llama-True")
    short = trained(folder, "llama", "llama-short", packing_length=128, micro_batch_size=1)
    one, other = (read_metrics(run / "metrics.jsonl") for run in (long, short))
    assert recorded(other, "loss") == pytest.approx(recorded(one, "loss"), abs=1e-5)
    assert recorded(other, "loss") != recorded(one, "loss")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deepseek_v3", {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ("llama", {"recompute_granularity": "selective"}),
    ],
)
def test_recomputed_layers_know_the_samples(folder: Path, name: str, options: dict[str, Any]) -> None:
    kept, again = trained(folder, name, f"{name}-True"), trained(folder, name, f"{name}-again", **options)
    one, other = (read_metrics(run / "metrics.jsonl") for run in (kept, again))
    assert recorded(other, "loss") == recorded(one, "loss")


@pytest.mark.long
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(folder: Path) -> None:
    whole = trained(folder, "qwen3_moe", "whole", save_steps=8)
    with parallel_processes(Layout()):
        back_to_first_checkpoint(whole, folder / "resumed", 8, STEPS)
    (folder / "resumed" / "iter_0000016").rename(folder / "not-there")
    resumed = trained(folder, "qwen3_moe", "resumed", save_steps=8)
    expected, found = (saved_tensors(run / f"iter_{STEPS:07d}") for run in (whole, resumed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    before, after = (read_metrics(run / "metrics.jsonl") for run in (whole, resumed))
    for figure in ("loss", "validation_loss", "grad_norm", "consumed_tokens"):
        assert recorded(after, figure) == recorded(before, figure)


@pytest.mark.long
def test_a_padded_run_can_go_on_packed(folder: Path) -> None:
    whole = trained(folder, "llama", "padded", save_steps=8, packing=False)
    with parallel_processes(Layout()):
        back_to_first_checkpoint(whole, folder / "packed-behind", 8, STEPS)
    (folder / "packed-behind" / "iter_0000016").rename(folder / "not-there-either")
    behind = trained(folder, "llama", "packed-behind", save_steps=8)
    before, after = (read_metrics(run / "metrics.jsonl") for run in (whole, behind))
    assert recorded(after, "loss") == pytest.approx(recorded(before, "loss"), abs=1e-5)


def model_of(name: str) -> GPTModel:
    hf_model, hf_config = tiny_hf_model(name)
    model = build_model(
        hf_config,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=Layout(),
        params_dtype=torch.float32,
        backend="torch",
    )
    fill(model, mcore_tensors(hf_model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE))
    return model.eval()


def logits(model: GPTModel, ids_S: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """`[S, V]` of a row of samples; None: of one that is not packed."""
    samples = None if lengths is None else PackedSamples.of(lengths, ids_S.device)
    positions_S = positions_in_samples(lengths or (len(ids_S),))
    logits_SV: Tensor = model(ids_S[None], positions_S[None], None, packed_seq_params=samples)[0]
    return logits_SV


@pytest.mark.parametrize("name", MODELS)
def test_what_a_sample_becomes_does_not_depend_on_its_neighbours(name: str) -> None:
    ids_S = torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    others_S = ids_S.clone()
    first, second = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    others_S[first:second] = (ids_S[first:second] + 17) % 200
    # Experts compute the tokens that chose them at once, whose number changes rounding.
    exact = {"atol": 1e-5, "rtol": 0} if name in ("qwen3_moe", "deepseek_v3", "gpt_oss") else {"atol": 0, "rtol": 0}
    with parallel_processes(Layout()), torch.no_grad():
        model = model_of(name)
        before, after = (logits(model, row, LENGTHS) for row in (ids_S, others_S))
        assert torch.allclose(before[:first], after[:first], **exact)
        assert torch.allclose(before[second:], after[second:], **exact)
        assert (before[first:second] - after[first:second]).abs().amax(-1).min() > 1e-3
        for part, alone in zip(before.split(LENGTHS), ids_S.split(LENGTHS), strict=True):
            assert torch.allclose(part, logits(model, alone, None), atol=1e-5, rtol=0)
        # Without bounds the first sample reaches the last.
        assert not torch.allclose(logits(model, ids_S, None)[second:], before[second:], atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_crosses_a_bound(name: str) -> None:
    ids_S = torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    first, second = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    grads: list[Tensor] = []
    with parallel_processes(Layout()):
        model = model_of(name)

        def watch(embedding: torch.nn.Module, inputs: Any, output_SBH: Tensor) -> None:
            output_SBH.register_hook(grads.append)

        model.embedding.register_forward_hook(watch)
        for lengths in (LENGTHS, None):
            logits(model, ids_S, lengths)[first:second].logsumexp(-1).sum().backward()
    packed, whole = (grad_SBH[:, 0].abs().amax(-1) for grad_SBH in grads)
    assert (packed[:first] == 0).all() and (packed[second:] == 0).all()
    assert (packed[first:second] > 0).all()
    assert (whole[:first] > 0).any()


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_turned_as_those_of_a_sample_alone(name: str) -> None:
    """Attention sees only by how much two positions differ, so that losses would not tell."""
    ids_S = torch.randint(3, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    seen: list[tuple[Tensor, ...]] = []
    with parallel_processes(Layout()), torch.no_grad():
        model = model_of(name)
        core = model.decoder.layers[0].self_attention.core_attention
        # The last of the hooks, behind that by which queries grow.
        core.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(x.flatten(1) for x in inputs[:2])))
        logits(model, ids_S, LENGTHS)
        for alone in ids_S.split(LENGTHS):
            logits(model, alone, None)
    packed, *of_samples = seen
    for number, whole in enumerate(packed):
        for part, alone in zip(whole.split(LENGTHS), of_samples, strict=True):
            assert torch.allclose(part, alone[number].reshape(part.shape), atol=1e-6, rtol=1e-6)
