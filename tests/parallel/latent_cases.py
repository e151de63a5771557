"""Runs under torchrun: latent attention, grouped experts and layers for further tokens, in several processes.

    latent_cases.py FOLDER     reads FOLDER/<model>.pt, writes FOLDER/results.json

Legend: B batch, S sequence, H hidden, P padded vocabulary
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

from mcore.backend.layout import Layout
from mcore.backend.parallel import start, stop
from tests.parallel.expert_cases import check_virtual, model_of
from tests.parallel.layout_cases import check, gathered
from tests.tiny_latent import LATENT_MODELS
from tests.tiny_mtp import MTP_MODELS

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "tp2_sp": Layout(**TP2_SP),
    "tp4_sp": Layout(tensor_model_parallel_size=4, sequence_parallel=True),
    "pp2": Layout(pipeline_model_parallel_size=2),
    "ep2": Layout(**EP2),
    "tp2_sp_ep2": Layout(**TP2_SP, **EP2),
    "tp2_sp_pp2": Layout(**TP2_SP, pipeline_model_parallel_size=2),
    "pp2_vpp2_ep2": Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, **EP2),
}
FURTHER = tuple(f"{name}_mtp" for name in MTP_MODELS)
FORWARD = [
    *((layout, name) for layout in ("tp2", "tp2_sp", "pp2", "ep2") for name in LATENT_MODELS),
    *((layout, name) for layout in ("tp2_sp", "pp2", "ep2", "tp2_sp_pp2") for name in FURTHER),
    *(
        (layout, name)
        for layout in ("tp4_sp", "tp2_sp_ep2")
        for name in ("deepseek_v3", "deepseek_v2_lite", "glm4_moe")
    ),
]
VIRTUAL = [("pp2_vpp2_ep2", name) for name in ("deepseek_v3", "deepseek_v3_mtp")]
DEPTHS = [(layout, name) for layout in ("tp2_sp", "pp2", "ep2", "tp2_sp_pp2") for name in FURTHER]
"""Logits of the layers for further tokens."""
BACKWARD = [("tp2_sp", name) for name in ("deepseek_v3", "moonlight", "glm4_moe")]
"""Gradients of all weights."""


@torch.no_grad()
def check_depths(case: Mapping[str, Any], layout: Layout) -> list[float] | None:
    """Errors of the logits of every depth, from the reference model's last hidden states on."""
    model = model_of(case, layout).eval()
    if not model.post_process:
        return None
    ids_BS = case["ids"]
    positions_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape[0], -1)
    hidden_SBH = case["hidden"].transpose(0, 1).contiguous()
    if layout.sequence_parallel:
        hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH)
    errors = []
    further = model.further_logits(ids_BS, positions_BS, hidden_SBH)
    for logits_BSV, of_rank in zip(case["depths"], further, strict=True):
        logits_BSP = gathered(of_rank)
        found = logits_BSP[..., : logits_BSV.shape[-1]] - logits_BSV
        errors.append((found.abs().max() / logits_BSV.std()).item())
    return errors


def check_gradients(case: Mapping[str, Any], layout: Layout) -> dict[str, float]:
    """Largest error of the gradient of any weight, by kind; every data parallel rank computes all samples."""
    model = model_of(case, layout).train()
    positions_BS = torch.arange(case["ids"].shape[1]).expand(case["ids"].shape[0], -1)
    model(case["ids"], positions_BS, None, labels=case["labels"]).mean().backward()
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        parameter.data = parameter.grad
    state = model.sharded_state_dict()
    apply_factories(state)
    errors: dict[str, float] = {}
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and not part.key.endswith("router.expert_bias"):
            reference = case["gradients"][part.key][part.global_slice()].reshape(part.data.shape)
            error = (part.data - reference).abs().max() / case["gradients"][part.key].std()
            kind = part.key.removeprefix("decoder.layers.").lstrip("0123456789.")
            errors[kind] = max(errors.get(kind, 0.0), error.item())
    return errors


def main(folder: Path) -> None:
    inputs = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    own: dict[str, Any] = {}
    for layout_name, layout in LAYOUTS.items():
        start(layout)
        for name in [name for it, name in FORWARD if it == layout_name]:
            checkpoint = folder / name if (folder / name).is_dir() else None
            with torch.no_grad():
                own[f"forward-{layout_name}-{name}"] = check(inputs[name], layout, checkpoint)
        for kind, cases, run in (
            ("virtual", VIRTUAL, check_virtual),
            ("depths", DEPTHS, check_depths),
            ("backward", BACKWARD, check_gradients),
        ):
            for name in [name for it, name in cases if it == layout_name]:
                own[f"{kind}-{layout_name}-{name}"] = run(inputs[name], layout)
    of_ranks: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    if dist.get_rank() == 0:
        results = {key: [of_rank[key] for of_rank in of_ranks if of_rank[key] is not None] for key in own}
        (folder / "results.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
