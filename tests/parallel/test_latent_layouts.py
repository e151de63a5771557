"""Latent attention, grouped experts and further-token layers compute in every layout what transformers computes."""

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
from tests.parallel.expert_cases import model_of
from tests.parallel.latent_cases import BACKWARD, DEPTHS, FORWARD, LAYOUTS, VIRTUAL
from tests.parallel.launch import run_torchrun
from tests.tiny_models import PADDED_VOCAB_SIZE, SIZES, mcore_tensors, tiny_hf_model
from tests.tiny_mtp import NUM_MTP_LAYERS, mtp_tensors, reference_logits, tiny_mtp_model

pytestmark = pytest.mark.layouts

NPROC = 4
FROM_CHECKPOINT = ("deepseek_v3", "glm4_moe_mtp")
"""Models whose weights go through a checkpoint that one process saved; the other models are filled by slicing."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """One launch of four processes does it all."""
    folder = tmp_path_factory.mktemp("latent")
    for name in sorted({name for _, name in FORWARD + VIRTUAL + BACKWARD}):
        torch.save(case_of(name), folder / f"{name}.pt")
    with parallel_processes(Layout()):
        for name in FROM_CHECKPOINT:
            (folder / name).mkdir()
            model = model_of(torch.load(folder / f"{name}.pt"), Layout())
            dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder / name))
    run_torchrun(NPROC, Path(__file__).with_name("latent_cases.py"), folder, folder=folder)
    return json.loads((folder / "results.json").read_text())


def case_of(name: str) -> dict[str, Any]:
    """What the reference model has and computes, gradients and further tokens included."""
    ids_BS = torch.randint(0, SIZES["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    labels_BS = ids_BS.roll(-1, dims=1)
    case: dict[str, Any] = {"ids": ids_BS, "labels": labels_BS}
    more: dict[str, Tensor] = {}
    if name.endswith("_mtp"):
        hf, further, config = tiny_mtp_model(name.removesuffix("_mtp"))
        more = mtp_tensors(hf, further)
        case |= {"depths": reference_logits(hf, further, ids_BS), "hidden": hf.model(ids_BS).last_hidden_state.detach()}
    else:
        hf, config = tiny_hf_model(name)
    case |= {"config": config, "tensors": mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE, more=more)}
    logits_BSV = hf(ids_BS).logits
    losses_BS = F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")
    if any(name == it for _, it in BACKWARD):
        losses_BS.mean().backward()
        for parameter in hf.parameters():
            parameter.data = parameter.grad
        case["gradients"] = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    return case | {"logits": logits_BSV.detach(), "losses": losses_BS.detach()}


@pytest.mark.parametrize(("layout", "name"), FORWARD)
def test_logits_and_losses_equal_the_reference_models(results: Any, layout: str, name: str) -> None:
    of_ranks = results[f"forward-{layout}-{name}"]
    assert len(of_ranks) == NPROC // LAYOUTS[layout].pipeline_model_parallel_size  # the last stage reports
    for result in of_ranks:
        assert result["relative_error"] < 2e-5
        assert result["loss_error"] < 2e-5
        assert result["largest_padding"] < -1e37


@pytest.mark.parametrize(("layout", "name"), VIRTUAL)
def test_logits_of_virtual_stages_equal_the_reference_models(results: Any, layout: str, name: str) -> None:
    of_ranks = results[f"virtual-{layout}-{name}"]
    assert len(of_ranks) == NPROC // 2
    assert all(result["relative_error"] < 2e-5 for result in of_ranks)


@pytest.mark.parametrize(("layout", "name"), DEPTHS)
def test_logits_of_further_tokens_equal_the_reference_models(results: Any, layout: str, name: str) -> None:
    of_ranks = results[f"depths-{layout}-{name}"]
    assert len(of_ranks) == NPROC // LAYOUTS[layout].pipeline_model_parallel_size
    for errors in of_ranks:
        assert len(errors) == NUM_MTP_LAYERS
        assert max(errors) < 2e-5


@pytest.mark.parametrize(("layout", "name"), BACKWARD)
def test_gradients_of_all_weights_equal_the_reference_models(results: Any, layout: str, name: str) -> None:
    of_ranks = results[f"backward-{layout}-{name}"]
    assert len(of_ranks) == NPROC
    for errors in of_ranks:
        assert "self_attention.linear_proj.weight" in errors
        assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
