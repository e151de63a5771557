"""What balances experts in training does what its formula says, and counts no padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore.backend.balancing import BalancedRouter
from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.data.prepare.build import build_datasets
from mcore.metrics import read_metrics
from mcore.train.run import train
from tests.reference_routers import RouterLosses
from tests.reference_training import train_with_transformers
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model
from tests.tiny_runs import make_base, recorded, saved_tensors, tiny_run

MODELS = ("qwen3_moe", "deepseek_v3")
BALANCED = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for name in MODELS:
        make_base(folder / name, name)
    return folder


def trained(folder: Path, name: str, output: str, **options: Any) -> Path:
    with parallel_processes(Layout()):
        train(tiny_run(folder, **options), folder / name, folder / output)
    return folder / output


@pytest.mark.parametrize(
    "options",
    [
        # A micro-batch is the whole step, as the reference's is.
        {"moe_router_load_balancing_type": "aux_loss", "micro_batch_size": 8},
        {"moe_router_load_balancing_type": "seq_aux_loss", "micro_batch_size": 2, "packing": False},
        {"moe_router_load_balancing_type": "seq_aux_loss", "packing": False, "recompute_granularity": "full"}
        | {"recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["aux_loss", "seq_aux_loss", "recomputed"],
)
def test_losses_that_balance_are_learnt_as_a_plain_loop_learns_them(
    folder: Path, request: pytest.FixtureRequest, options: dict[str, Any]
) -> None:
    output = trained(folder, "qwen3_moe", request.node.callspec.id, **BALANCED, **options)
    run = tiny_run(folder, **BALANCED, **options)
    data, _ = build_datasets(run.data, "sft", folder / "qwen3_moe" / "hf")
    model, hf_config = tiny_hf_model("qwen3_moe")
    losses = train_with_transformers(model, run, data, RouterLosses(model, run.train))
    assert recorded(read_metrics(output / "metrics.jsonl"), "loss") == pytest.approx(losses, abs=1e-5)
    weights = saved_tensors(output / "iter_0000012")
    expected = mcore_tensors(model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE)
    for key, tensor in expected.items():
        assert torch.allclose(weights[key], tensor, atol=1e-4, rtol=0), key
    plain, _ = tiny_hf_model("qwen3_moe")
    train_with_transformers(plain, run, data)
    unbalanced = mcore_tensors(plain, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE)
    router = "decoder.layers.mlp.router.weight"
    assert (unbalanced[router] - expected[router]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_follows_the_tokens_that_are_recorded(folder: Path, dtype: str) -> None:
    output = trained(folder, "deepseek_v3", f"bias-{dtype}", moe_router_bias_update_rate=0.01, torch_dtype=dtype)
    records = read_metrics(output / "metrics.jsonl")
    run = tiny_run(folder)
    data, _ = build_datasets(run.data, "sft", folder / "deepseek_v3" / "hf")
    before, after = (
        saved_tensors(folder / "deepseek_v3" / "release"),
        saved_tensors(output / "iter_0000012"),
    )
    counts = torch.tensor(recorded(records, "expert_tokens"))  # steps, layers, experts
    for step in range(12):
        lengths = [len(sample.token_ids) - 1 for sample in data.batch(step * 8, 8)]
        assert set(counts[step].sum(-1).tolist()) == {4 * sum(lengths)}
    moves = torch.sign(counts.float().mean(-1, keepdim=True) - counts).sum(0) * 0.01
    for layer in (1, 2, 3):
        key = f"decoder.layers.{layer}.mlp.router.expert_bias"
        assert torch.allclose(after[key], before[key] + moves[layer - 1], atol=1e-6), key
    assert moves.abs().max() > 0.02


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_an_expert_takes_no_more_than_its_capacity_and_no_padding(folder: Path, policy: str) -> None:
    model, hf_config = tiny_hf_model("qwen3_moe")
    with parallel_processes(Layout()):
        module = build_model(
            hf_config,
            padded_vocab_size=PADDED_VOCAB_SIZE,
            layout=Layout(),
            params_dtype=torch.float32,
            backend="torch",
            training={"moe_expert_capacity_factor": 0.7, "moe_token_drop_policy": policy},
        )
        fill(module, mcore_tensors(model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE))
        router = next(layer for layer in module.modules() if isinstance(layer, BalancedRouter))
        hidden_SBH = torch.randn(16, 3, 64, generator=torch.Generator().manual_seed(0))
        padding_SB = torch.arange(16)[:, None] >= torch.tensor([16, 9, 4])
        whole = router.capacity_factor, router.routing(router.gating(hidden_SBH))
        weights_TE, kept_TE = router(hidden_SBH, padding_SB)
    capacity = math.ceil(29 * 4 / 8 * whole[0])
    all_weights_TE, chosen_TE = whole[1]
    is_token_T = ~padding_SB.flatten()
    for expert in range(8):
        candidates = (chosen_TE[:, expert] & is_token_T).nonzero().flatten()
        if policy == "probs":
            candidates = candidates[all_weights_TE[candidates, expert].argsort(descending=True)]
        expected = torch.zeros(48, dtype=torch.bool)
        expected[candidates[:capacity]] = True
        assert torch.equal(kept_TE[:, expert], expected)
    assert kept_TE.sum() < (chosen_TE & is_token_T[:, None]).sum()
    assert torch.equal(weights_TE, all_weights_TE * kept_TE)


def test_a_model_whose_experts_drop_tokens_learns(folder: Path) -> None:
    output = trained(folder, "deepseek_v3", "dropping", moe_expert_capacity_factor=1.0)
    losses = recorded(read_metrics(output / "metrics.jsonl"), "loss")
    whole = recorded(read_metrics(trained(folder, "deepseek_v3", "whole") / "metrics.jsonl"), "loss")
    assert losses[-1] < losses[0] - 1
    assert abs(losses[0] - whole[0]) > 1e-3
