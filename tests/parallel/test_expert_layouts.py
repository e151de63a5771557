"""Every layout of models with experts, and virtual stages, computes what one process and transformers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from tests.parallel.expert_cases import BACKWARD, FORWARD, LAYOUTS, VIRTUAL, model_of
from tests.parallel.launch import run_torchrun
from tests.tiny_models import PADDED_VOCAB_SIZE, SIZES, mcore_tensors, tiny_hf_model

pytestmark = pytest.mark.layouts

NPROC = 4
FROM_CHECKPOINT = ("qwen2_moe", "qwen3_moe_mixed", "gpt_oss")
"""Models whose weights go through a checkpoint that one process saved; the other models are filled by slicing."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """One launch of four processes does it all."""
    folder = tmp_path_factory.mktemp("experts")
    for name in sorted({name for _, name in FORWARD + VIRTUAL + BACKWARD}):
        torch.save(case_of(name), folder / f"{name}.pt")
    with parallel_processes(Layout()):
        for name in FROM_CHECKPOINT:
            (folder / name).mkdir()
            model = model_of(torch.load(folder / f"{name}.pt"), Layout())
            dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder / name))
    run_torchrun(NPROC, Path(__file__).with_name("expert_cases.py"), folder, folder=folder)
    return json.loads((folder / "results.json").read_text())


def case_of(name: str) -> dict[str, Any]:
    """What the reference model has and computes, gradients included."""
    ids_BS = torch.randint(0, SIZES["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    labels_BS = ids_BS.roll(-1, dims=1)
    hf, config = tiny_hf_model(name)
    tensors = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    logits_BSV = hf(ids_BS).logits
    losses_BS = F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")
    losses_BS.mean().backward()
    gradients: dict[str, Tensor] = {}
    if any(name == it for _, it in BACKWARD):
        for parameter in hf.parameters():
            parameter.data = parameter.grad
        gradients = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    return {
        "config": config,
        "tensors": tensors,
        "ids": ids_BS,
        "labels": labels_BS,
        "logits": logits_BSV.detach(),
        "losses": losses_BS.detach(),
        "gradients": gradients,
    }


@pytest.mark.parametrize(("layout", "name"), FORWARD)
def test_logits_and_losses_equal_the_reference_models(results, layout: str, name: str) -> None:
    of_ranks = results[f"forward-{layout}-{name}"]
    assert len(of_ranks) == NPROC // LAYOUTS[layout].pipeline_model_parallel_size  # the last stage reports
    for result in of_ranks:
        assert result["relative_error"] < 2e-5
        assert result["loss_error"] < 2e-5
        assert result["largest_padding"] < -1e37


@pytest.mark.parametrize(("layout", "name"), VIRTUAL)
def test_logits_of_virtual_stages_equal_the_reference_models(results, layout: str, name: str) -> None:
    of_ranks = results[f"virtual-{layout}-{name}"]
    assert len(of_ranks) == NPROC // 2
    assert all(result["relative_error"] < 2e-5 for result in of_ranks)


@pytest.mark.parametrize(("layout", "name"), BACKWARD)
def test_gradients_of_experts_and_routers_equal_the_reference_models(results, layout: str, name: str) -> None:
    of_ranks = results[f"backward-{layout}-{name}"]
    assert len(of_ranks) == NPROC
    for result in of_ranks:
        assert 0 < result["experts"] < 1e-4
        assert 0 < result["router"] < 1e-4
