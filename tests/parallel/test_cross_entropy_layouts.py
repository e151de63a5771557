"""Under tensor and sequence parallelism, chunks of tokens give the losses and gradients of all logits at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.parallel.cross_entropy_cases import CHUNKS, LAYOUTS, MODELS
from tests.parallel.launch import run_torchrun
from tests.tiny_models import PADDED_VOCAB_SIZE, SIZES, mcore_tensors, tiny_hf_model


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """Of both ranks; one launch of two processes does it all."""
    folder = tmp_path_factory.mktemp("cross_entropy")
    draw = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, SIZES["vocab_size"], (2, 32), generator=draw)
    labels_BS = ids_BS.roll(-1, dims=1)
    places_T = torch.randperm(64, generator=draw)[:23].sort().values
    for name in MODELS:
        hf, config = tiny_hf_model(name)
        with torch.no_grad():
            losses_BS = F.cross_entropy(hf(ids_BS).logits.transpose(1, 2), labels_BS, reduction="none")
        case = {
            "config": config,
            "tensors": mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE),
            "ids": ids_BS,
            "labels": labels_BS,
            "places": places_T,
            "weights": torch.rand(len(places_T), generator=draw) * 2,
            "losses": losses_BS.t().flatten()[places_T],
        }
        torch.save(case, folder / f"{name}.pt")
    run_torchrun(2, Path(__file__).with_name("cross_entropy_cases.py"), folder, folder=folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_give_what_all_logits_give(results, layout: str, name: str, chunk_tokens: int | None) -> None:
    for of_rank in results:
        errors = of_rank[f"{layout}-{name}-{chunk_tokens}"]
        assert errors["loss"] < 2e-6
        assert errors["loss_to_reference"] < 2e-5
        assert errors["gradient"] < 1e-4
