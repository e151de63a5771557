"""Runs under torchrun: models with experts, and virtual stages, against what the reference model computed alone.

    expert_cases.py FOLDER     reads FOLDER/<model>.pt, writes FOLDER/results.json

B batch, S sequence, P padded vocabulary
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import start, stop
from tests.parallel.layout_cases import check, gathered
from tests.tiny_models import PADDED_VOCAB_SIZE, fill
from tests.tiny_moe import MOE

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "tp2_sp": Layout(**TP2_SP),
    "tp2_sp_etp1": Layout(**TP2_SP, expert_tensor_parallel_size=1),
    "pp2": Layout(pipeline_model_parallel_size=2),
    "ep2": Layout(**EP2),
    "ep4": Layout(expert_model_parallel_size=4),
    "ep2_etp2": Layout(**EP2, expert_tensor_parallel_size=2),
    "tp2_sp_ep2": Layout(**TP2_SP, **EP2),
    "tp2_sp_ep2_etp1": Layout(**TP2_SP, **EP2, expert_tensor_parallel_size=1),
    "pp2_ep2": Layout(pipeline_model_parallel_size=2, **EP2),
    "pp2_vpp2": Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "pp2_vpp2_ep2": Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, **EP2),
}
WITHOUT_BIAS = tuple(name for name in MOE if name != "gpt_oss")
FORWARD = [
    *((layout, name) for layout in ("pp2", "ep2") for name in MOE),
    *(("tp2_sp", name) for name in WITHOUT_BIAS),
    *((layout, "gpt_oss") for layout in ("tp2_sp_etp1", "tp2_sp_ep2_etp1")),
    *((layout, "mixtral") for layout in ("tp2", "ep4", "tp2_sp_etp1")),
    *((layout, name) for layout in ("ep2_etp2", "tp2_sp_ep2", "pp2_ep2") for name in ("qwen2_moe", "qwen3_moe_mixed")),
]
VIRTUAL = [
    *(("pp2_vpp2", name) for name in ("qwen3_tied", "mistral_yarn", "gemma2", "gemma3")),
    ("pp2_vpp2_ep2", "qwen3_moe_mixed"),
]
BACKWARD = [
    ("ep2", "qwen2_moe"),
    ("ep2", "gpt_oss"),
    ("ep4", "mixtral"),
    ("tp2_sp_ep2", "qwen3_moe"),
    ("tp2_sp_ep2_etp1", "gpt_oss"),
]
"""Of each, the losses' gradients of the experts and the router."""


def model_of(case: Mapping[str, Any], layout: Layout, vp_stage: int | None = None) -> GPTModel:
    model = build_model(
        case["config"],
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=layout,
        params_dtype=torch.float32,
        backend="torch",
        vp_stage=vp_stage,
    )
    fill(model, case["tensors"])
    return model


@torch.no_grad()
def check_virtual(case: Mapping[str, Any], layout: Layout) -> dict[str, float] | None:
    """Logits of a process that has several parts of the model, taken in turns with the other's."""
    num_parts = layout.virtual_pipeline_model_parallel_size or 1
    models = [model_of(case, layout, part).eval() for part in range(num_parts)]
    ids_BS = case["ids"]
    positions_BS = torch.arange(ids_BS.shape[1]).expand(1, -1)

    def step(samples: Iterator[Tensor], model: GPTModel) -> tuple[Tensor, Any]:
        return model(next(samples), positions_BS, None), partial(lambda output, non_loss_data: output)

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(ids_BS.chunk(2)) for _ in models],
        model=models,
        num_microbatches=2,
        seq_length=ids_BS.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not models[-1].post_process:
        return None
    logits_BSP, vocab_size = gathered(torch.cat(outputs)), case["logits"].shape[-1]
    error = (logits_BSP[..., :vocab_size] - case["logits"]).abs().max() / case["logits"].std()
    return {"relative_error": error.item()}


def check_backward(case: Mapping[str, Any], layout: Layout) -> dict[str, float]:
    """Gradients of this rank's experts, and of the routers, where data parallel ranks have one sample each."""
    model = model_of(case, layout).train()
    num_samples = case["ids"].shape[0]
    sample = slice(own := parallel_state.get_data_parallel_rank() % num_samples, own + 1)
    ids_BS, labels_BS = case["ids"][sample], case["labels"][sample]
    positions_BS = torch.arange(ids_BS.shape[1]).expand(1, -1)
    (model(ids_BS, positions_BS, None, labels=labels_BS).mean() / num_samples).backward()
    times_there = parallel_state.get_data_parallel_world_size() / num_samples  # of each sample, over all ranks
    for name, parameter in model.named_parameters():
        if ".router." in name:
            dist.all_reduce(parameter.grad)  # each rank has a part of the tokens
        elif ".mlp.experts." in name:
            dist.all_reduce(parameter.grad, group=parallel_state.get_expert_data_parallel_group())
        parameter.data = parameter.grad / times_there
    state = model.sharded_state_dict()
    apply_factories(state)
    errors = {"experts": 0.0, "router": 0.0}
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and (".mlp.experts." in part.key or ".router." in part.key):
            reference = case["gradients"][part.key]
            found = part.data - reference[part.global_slice()].reshape(part.data.shape)
            kind = "router" if ".router." in part.key else "experts"
            errors[kind] = max(errors[kind], (found.abs().max() / reference.std()).item())
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
        for name in [name for it, name in VIRTUAL if it == layout_name]:
            own[f"virtual-{layout_name}-{name}"] = check_virtual(inputs[name], layout)
        for name in [name for it, name in BACKWARD if it == layout_name]:
            own[f"backward-{layout_name}-{name}"] = check_backward(inputs[name], layout)
    of_ranks: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    if dist.get_rank() == 0:
        results = {key: [of_rank[key] for of_rank in of_ranks if of_rank[key] is not None] for key in own}
        (folder / "results.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
