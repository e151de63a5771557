"""Arguments that take more than a row: several that go together, names of models and data, defaults that depend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flows.from_swift.draft import Draft, Finding, shown
from flows.from_swift.rules import checkpoints, model_and_data, training
from flows.from_swift.table import Argument
from mcore.errors import Problem

Rule = Callable[[Draft, Argument], None]

RULES: Mapping[str, Rule] = {
    "model": model_and_data.model,
    "use_hf": model_and_data.part_of_model,
    "model_revision": model_and_data.part_of_model,
    "torch_dtype": model_and_data.torch_dtype,
    "max_length": model_and_data.max_length,
    "truncation_strategy": model_and_data.truncation_strategy,
    "dataset": model_and_data.dataset,
    "val_dataset": model_and_data.dataset,
    "dataset_shuffle": model_and_data.shuffle,
    "train_dataloader_shuffle": model_and_data.shuffle,
    "system": model_and_data.system,
    "loss_scale": model_and_data.loss_scale,
    "num_train_epochs": training.num_train_epochs,
    "lr_decay_iters": training.lr_decay_iters,
    "global_batch_size": training.global_batch_size,
    "packing": training.packing,
    "padding_free": training.padding_free,
    "moe_router_load_balancing_type": training.balancing_type,
    "moe_router_bias_update_rate": training.bias_update_rate,
    "gradient_accumulation_fusion": training.gradient_accumulation_fusion,
    "no_gradient_accumulation_fusion": training.gradient_accumulation_fusion,
    "cross_entropy_loss_fusion": training.cross_entropy_loss_fusion,
    "output_dir": checkpoints.output_dir,
    "save_safetensors": checkpoints.save_safetensors,
    "merge_lora": checkpoints.merge_lora,
    "load_safetensors": checkpoints.load_safetensors,
    "max_shard_size": checkpoints.max_shard_size,
    "finetune": checkpoints.finetune,
    "adapters": checkpoints.adapters,
}
"""Rules by the argument that they are about; all others go by their row alone."""


def environment(draft: Draft) -> None:
    """Variables in front of the command: the number of processes is ours, others stay where they are."""
    for name, value in draft.command.environment.items():
        if name == "NPROC_PER_NODE":
            draft.values["launch.nproc_per_node"] = _number(draft, name, value)
            draft.findings.append(Finding(name, value, "carried", f"launch.nproc_per_node: {value}"))
        elif name == "NNODES" and value != "1":
            note = "a run has the processes of one machine; the same batch is made of more micro-batches"
            draft.findings.append(Finding(name, value, "left out", note=note, effect="speed"))
        elif name == "USE_HF":
            draft.findings.append(Finding(name, value, "changed", f"model.source: {draft.source}"))
        elif name not in {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}:
            note = "set it in front of mcore-flows, too, if it is wanted"
            draft.findings.append(Finding(name, shown(value), "left out", note=note, effect="speed"))


def _number(draft: Draft, name: str, value: str) -> Any:
    if not value.isdigit():
        draft.problems.append(Problem(name, "a number of processes", value))
        return 1
    return int(value)


LAST: tuple[Callable[[Draft], None], ...] = (environment,)
"""Rules of no argument."""
