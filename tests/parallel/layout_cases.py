"""Runs under torchrun: every model in every layout, against what the reference model computed in one process.

    layout_cases.py FOLDER     reads FOLDER/<model>.pt, writes FOLDER/results.json

B batch, S sequence, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights
from mcore.backend.model import build_model
from mcore.backend.parallel import start, stop
from tests.tiny_models import MODELS, PADDED_VOCAB_SIZE, fill

LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "tp2_sp": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    "tp4_sp": Layout(tensor_model_parallel_size=4, sequence_parallel=True),
    "pp2": Layout(pipeline_model_parallel_size=2),
    "pp4": Layout(pipeline_model_parallel_size=4),
    "tp2_sp_pp2": Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
}
TIED = ("llama3", "qwen3_tied")
DENSE = (
    "llama_attention_bias",
    "llama_mlp_bias",
    "llama_dynamic",
    "mistral_yarn",
    "ministral",
    "ministral3",
    "qwen2_window",
    "qwen3_bias",
    "phi3",
    "phi4_partial",
)
"""One of each table, kind of window, and rope that depends on the length or has a factor."""
NORMED = ("gemma2", "gemma3", "olmo2_bias", "glm4")
CLASSIFIERS = ("llama_classifier", "qwen2_reward")
CASES = [
    *((layout, name) for layout in ("tp2_sp", "pp2", "tp2_sp_pp2") for name in MODELS),
    *((layout, name) for layout in ("tp2_sp", "pp2") for name in DENSE),
    *((layout, name) for layout in ("tp2", "tp2_sp", "pp2") for name in NORMED),
    *((layout, name) for layout in ("tp2_sp", "pp2", "tp2_sp_pp2") for name in CLASSIFIERS),
    # These differ from the ones above in little but the number of ranks; what a tied embedding spans is the risk.
    *((layout, name) for layout in ("tp2", "tp4_sp", "pp4") for name in TIED),
]


def forward(model: GPTModel, ids_BS: Tensor, labels_BS: Tensor | None) -> Tensor | None:
    """Output of the last stage over both micro-batches, None on other stages: losses `[B, S]` or logits `[B, S, P]`."""
    positions_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape[0] // 2, -1)
    halves = zip(ids_BS.chunk(2), (None, None) if labels_BS is None else labels_BS.chunk(2), strict=True)

    def step(batches: Any, module: GPTModel) -> tuple[Tensor, Any]:
        ids, labels = next(batches)
        return module(ids, positions_BS, None, labels=labels), partial(lambda o, non_loss_data: o)

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=halves,
        model=[model],
        num_microbatches=2,
        seq_length=ids_BS.shape[1],
        micro_batch_size=ids_BS.shape[0] // 2,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(outputs) if model.post_process else None


def gathered(logits_BSV: Tensor) -> Tensor:
    """Logits of all tensor parallel ranks, side by side."""
    parts = [torch.empty_like(logits_BSV) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, logits_BSV.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def check(case: dict[str, Any], layout: Layout, checkpoint: Path | None) -> dict[str, float] | None:
    model = build_model(
        case["config"],
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=layout,
        params_dtype=torch.float32,
        backend="torch",
    ).eval()
    if checkpoint is None:
        fill(model, case["tensors"])
    else:
        load_weights(model, checkpoint)
    if case["losses"] is None:  # of a classifier, whose logits every rank has all of
        logits_BSL = forward(model, case["ids"], None)
        error = None if logits_BSL is None else (logits_BSL - case["logits"]).abs().max() / case["logits"].std()
        return None if error is None else {"relative_error": error.item()}
    logits_BSP, losses_BS = forward(model, case["ids"], None), forward(model, case["ids"], case["labels"])
    if logits_BSP is None or losses_BS is None:
        return None
    logits_BSP, vocab_size = gathered(logits_BSP), case["logits"].shape[-1]
    error = (logits_BSP[..., :vocab_size] - case["logits"]).abs().max() / case["logits"].std()
    return {
        "relative_error": error.item(),
        "loss_error": (losses_BS - case["losses"]).abs().max().item(),
        "largest_padding": logits_BSP[..., vocab_size:].max().item(),
    }


def main(folder: Path) -> None:
    inputs = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    own = {}
    for layout_name, cases in groupby(sorted(CASES), key=lambda case: case[0]):
        layout = LAYOUTS[layout_name]
        start(layout)
        for _, name in cases:
            checkpoint = folder / name if (folder / name).is_dir() else None
            with torch.no_grad():
                result = check(inputs[name], layout, checkpoint)
            if result is not None:
                own[f"{layout_name}-{name}-{dist.get_rank()}"] = result
    gathered_results: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered_results, own)
    if dist.get_rank() == 0:
        partial_file = folder / f".results.{os.getpid()}"
        partial_file.write_text(
            json.dumps({key: value for results in gathered_results for key, value in results.items()})
        )
        partial_file.rename(folder / "results.json")
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
