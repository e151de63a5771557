"""Every layout computes what one process and transformers compute: logits, losses, with a padded vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from tests.parallel.launch import run_torchrun
from tests.parallel.layout_cases import CASES, CLASSIFIERS
from tests.tiny_models import PADDED_VOCAB_SIZE, SIZES, fill, mcore_tensors, tiny_hf_model

NPROC = 4
RANKS = {"tp2": 4, "tp2_sp": 4, "tp4_sp": 4, "pp2": 2, "pp4": 1, "tp2_sp_pp2": 2}
"""Ranks of the last stage, each of which reports."""
FROM_CHECKPOINT = ("llama_bias", "qwen3_tied")
"""Models whose weights go through a checkpoint that one process saved; the other models are filled by slicing."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """One launch of four processes does it all."""
    folder = tmp_path_factory.mktemp("layouts")
    ids_BS = torch.randint(0, SIZES["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    labels_BS = ids_BS.roll(-1, dims=1)
    for name in sorted({name for _, name in CASES}):
        hf, config = tiny_hf_model(name)
        with torch.no_grad():
            logits_BSV = hf.score(hf.model(ids_BS)[0]) if name in CLASSIFIERS else hf(ids_BS).logits
        case = {
            "config": config,
            "tensors": mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE),
            "ids": ids_BS,
            "labels": labels_BS,
            "logits": logits_BSV,
            "losses": None
            if name in CLASSIFIERS
            else F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none"),
        }
        torch.save(case, folder / f"{name}.pt")
    with parallel_processes(Layout()):
        for name in FROM_CHECKPOINT:
            save_checkpoint(folder, name)
    run_torchrun(NPROC, Path(__file__).with_name("layout_cases.py"), folder, folder=folder)
    return json.loads((folder / "results.json").read_text())


def save_checkpoint(folder: Path, name: str) -> None:
    case = torch.load(folder / f"{name}.pt")
    model = build_model(
        case["config"],
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=Layout(),
        params_dtype=torch.float32,
        backend="torch",
    )
    fill(model, case["tensors"])
    (folder / name).mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder / name))


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_logits_and_losses_equal_the_reference_models(results, layout: str, name: str) -> None:
    of_ranks = [result for key, result in results.items() if key.rpartition("-")[0] == f"{layout}-{name}"]
    assert len(of_ranks) == RANKS[layout]
    for result in of_ranks:
        assert result["relative_error"] < 2e-5
        if name in CLASSIFIERS:
            continue
        assert result["loss_error"] < 2e-5
        assert result["largest_padding"] < -1e37
