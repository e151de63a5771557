"""Runs under torchrun: losses of chosen tokens in chunks, and their gradients, beside those of all logits at once.

    cross_entropy_cases.py FOLDER     reads FOLDER/<model>.pt, writes FOLDER/<rank>.json

B batch, S sequence, T chosen tokens
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.backend.cross_entropy import ChosenTokenLosses
from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import start, stop
from tests.tiny_models import PADDED_VOCAB_SIZE, fill

LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "tp2_sp": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
}
MODELS = ("llama", "qwen3_tied", "gemma2")
CHUNKS = (5, None)


def model_of(case: dict[str, Any], layout: Layout) -> GPTModel:
    model = build_model(
        case["config"],
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=layout,
        params_dtype=torch.float32,
        backend="torch",
    ).train()
    fill(model, case["tensors"])
    return model


def chosen(of_all_BS: Tensor, places_T: Tensor) -> Tensor:
    return of_all_BS.t().flatten()[places_T]


def check(case: dict[str, Any], layout: Layout, chunk_tokens: int | None) -> dict[str, float]:
    ids_BS, labels_BS, places_T = case["ids"], case["labels"], case["places"]
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    plain, chunked = model_of(case, layout), model_of(case, layout)
    expected_T = chosen(plain(ids_BS, positions_BS, None, labels=labels_BS), places_T)
    weights_T = torch.ones_like(expected_T) if chunk_tokens is None else case["weights"]
    expected_T = expected_T * weights_T
    (0.5 * expected_T.sum()).backward()
    losses = ChosenTokenLosses(chunked, chunk_tokens)
    losses.places_T, losses.weights_1T = places_T, None if chunk_tokens is None else weights_T[None]
    found_1T = chunked(ids_BS, positions_BS, None, labels=chosen(labels_BS, places_T)[None])
    (0.5 * found_1T.sum()).backward()
    gradient_errors = [
        ((a.grad - b.grad).abs().max() / a.grad.std()).item()
        for a, b in zip(plain.parameters(), chunked.parameters(), strict=True)
    ]
    return {
        "loss": (found_1T[0] - expected_T).abs().max().item(),
        "loss_to_reference": (found_1T[0] - case["losses"] * weights_T).abs().max().item(),
        "gradient": max(gradient_errors),
    }


def main(folder: Path) -> None:
    results = {}
    for layout_name, layout in LAYOUTS.items():
        start(layout)
        for name in MODELS:
            case = torch.load(folder / f"{name}.pt")
            for chunk_tokens in CHUNKS:
                results[f"{layout_name}-{name}-{chunk_tokens}"] = check(case, layout, chunk_tokens)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
