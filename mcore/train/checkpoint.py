"""A run's checkpoints: weights, optimizer, scheduler, generators and position, in Megatron's own shape.

    OUTPUT/iter_0000100/                          torch_dist, written by megatron-core
    OUTPUT/latest_checkpointed_iteration.txt      written once that folder is durable and found complete
    OUTPUT/hf/                                    the base model's config and tokenizer files, for export
    OUTPUT/hf_0000100/                            with `train.save_safetensors`: the same weights, Hugging Face's shape

The optimizer is saved `fully_reshardable`: a run may go on with another layout.
Source: names and meaning of the state's keys as in Megatron-LM (core 0.16.1) `training/checkpointing.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling

from mcore.backend.layout import Layout
from mcore.bridge.dist_files import read_dist_tensors, refuse_code
from mcore.bridge.hf_config import CONFIG_FILE, HF_FOLDER, copy_small_files, read_hf_config
from mcore.errors import CheckpointError, Problem, SavingError
from mcore.folders import fsync_folder, fsync_path, write_durably
from mcore.select import TRACKER, completeness_problems, iteration_dir
from mcore.train import adam, offload
from mcore.train.housekeeping import remove_iteration
from mcore.train.model import Training
from mcore.train.moments import refuse_other_moments, whole_state
from mcore.train.position import Position
from mcore.train.writing import Writing, results_of_this_rank

OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo on one rank of each data parallel group, so no device ever holds the whole state.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    # Moments of experts have the same name whether or not experts have an optimizer of their own in some layout.
    "chained_optim_avoid_prefix": True,
}


class Saving:
    """A checkpoint that is being made, from `begin` to `finish`; until then no tracker names it."""

    def __init__(self, output: Path, position: Position, writing: Writing) -> None:
        self.position = position
        self._output = output
        self._writing = writing

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part."""
        return self._writing.is_done

    @property
    def seconds(self) -> float:
        """How long this rank wrote."""
        return self._writing.seconds

    def finish(self) -> None:
        """Wait until all of it is on disk, check it, and name it in the tracker; all ranks call it.

        Raises:
            SavingError: What was written is not complete. The tracker still names the one before.
        """
        iteration = self.position.iteration
        self._writing.finish()
        if dist.get_rank() == 0:
            folder = iteration_dir(self._output, iteration)
            fsync_folder(folder)
            fsync_path(self._output)
            problems = completeness_problems(folder)
            if problems:
                raise SavingError(f"iteration {iteration} was not written completely", problems)
            write_durably(self._output / TRACKER, str(iteration))
        dist.barrier()


def begin(
    output: Path,
    training: Training,
    position: Position,
    layout: Layout,
    settings: Mapping[str, Any],
    *,
    in_background: bool = False,
) -> Saving:
    """Begin to write the checkpoint of an iteration; all ranks call it, and then `finish`.

    Args:
        output: The run's folder.
        training: Model, optimizer and scheduler.
        position: Where the run stands.
        layout: How the model is divided.
        settings: Plain values for Megatron's `args`, so that its tools can tell what the checkpoint is.
        in_background: Whether `training` may change before `finish`.

    Raises:
        SavingError: megatron-core did not gather the optimizer's state rightly.
    """
    folder = iteration_dir(output, position.iteration)
    if dist.get_rank() == 0:
        if folder.exists():  # of a run that was killed before it could move the tracker
            remove_iteration(output, position.iteration)
        folder.mkdir(parents=True)
    dist.barrier()
    results_of_this_rank()
    state = _state(training, layout, position.updates, is_loading=False)
    state["opt_param_scheduler"] = training.scheduler.state_dict()
    state["position"] = dataclasses.asdict(position)
    state["iteration"] = position.iteration
    state["checkpoint_version"] = 3.0
    state["args"] = argparse.Namespace(
        **{
            **settings,
            "iteration": position.iteration,
            "consumed_train_samples": position.consumed_samples,
            "tensor_model_parallel_size": layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
            "expert_model_parallel_size": layout.expert_model_parallel_size,
            "context_parallel_size": layout.context_parallel_size,
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        }
    )
    request = dist_checkpointing.save(
        state, str(folder), async_sharded_save=True, content_metadata=dict(OPTIMIZER_FORMAT)
    )
    return Saving(output, position, Writing(request, from_copies=in_background))


def load(folder: Path, training: Training, layout: Layout) -> Position:
    """Put a checkpoint's state into a model, its optimizer, its scheduler and this process' generators.

    Args:
        folder: A complete `iter_…` folder.
        training: What to put it into.
        layout: How the model is divided now. If it was divided otherwise, the generators stay as they are seeded.

    Raises:
        CheckpointError: The checkpoint does not hold what the run needs.
        SavingError: The optimizer did not take what it holds.
    """
    # torch unpickles whatever `.metadata` and the objects beside the tensors name; these refuse all but plain values.
    stored = read_dist_tensors(folder)
    refuse_code(folder)
    common = _common_state(folder)
    saved = common["args"]
    copies = getattr(saved, "data_parallel_size", 1) * getattr(saved, "context_parallel_size", 1)
    same_layout = _generators(saved, copies) == _generators(
        layout, parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    )
    adam.prime(training.optimizer)
    state = _state(training, layout, 0, is_loading=True)
    if not same_layout:
        del state["rng_state"]
    loaded, unread, absent = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    unread -= set() if same_layout else {"rng_state"}
    if unread or absent:
        raise CheckpointError(
            f"{folder} does not fit this run",
            [Problem(key, "it in the checkpoint", "nothing of that name") for key in sorted(absent)]
            + [Problem(key, "nothing of that name", "it in the checkpoint") for key in sorted(unread)],
        )
    training.load_weights(loaded["model"])
    adam.load(training.optimizer, loaded["optimizer"])
    training.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_layout:
        _set_rng_state(loaded["rng_state"][0])
    position = Position(**loaded["position"])
    refuse_other_moments(training, folder, stored, updates=position.updates)
    return position


def _common_state(folder: Path) -> dict[str, Any]:
    """What all ranks have in common; megatron-core reads it by torch's allow-list.

    Raises:
        CheckpointError: It can't be read, or names what is not on the list.
    """
    try:
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    except (OSError, RuntimeError, pickle.UnpicklingError) as exc:
        found = str(exc).partition("\n")[0]
        raise CheckpointError(
            f"{folder} can't be opened", [Problem(str(folder / "common.pt"), "plain values", found)]
        ) from exc
    return common


def copy_hf_files(hf: Path, hf_config: Mapping[str, Any], output: Path) -> None:
    """Copy the base's small files (config, tokenizer, chat template) into the run's `hf/`, whole or not at all.

    Args:
        hf: The base's folder with these files.
        hf_config: Its config, where that says what the file does not.
        output: The run's folder.
    """
    target = output / HF_FOLDER
    if target.exists():
        return
    partial = output / f".{HF_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    copy_small_files(hf, partial)
    if read_hf_config(hf) != hf_config:
        (partial / CONFIG_FILE).write_text(json.dumps(hf_config, indent=2, ensure_ascii=False) + "\n")
    fsync_folder(partial)
    partial.rename(target)
    fsync_path(output)


def _state(training: Training, layout: Layout, updates: int, *, is_loading: bool) -> dict[str, Any]:
    model, metadata = training.sharded_weights(), dict(OPTIMIZER_FORMAT)
    with adam.step_count_everywhere(training.optimizer, updates), whole_state(training.optimizer):
        optimizer = training.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    of_experts = [part for key, part in optimizer.items() if isinstance(key, int)]  # if they have one of their own
    for part in (optimizer, *of_experts):
        offload.without_classes(part)
        if part.get("param_state", part) is None:
            del part["param_state"]  # gathered on another rank; megatron-core would warn that the ranks differ
    return {"model": model, "optimizer": optimizer, "rng_state": _sharded_rng_state(layout)}


def _sharded_rng_state(layout: Layout) -> ShardedObject:
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    shape = _generators(layout, parallel_state.get_data_parallel_world_size(with_context_parallel=True))
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank(), rank)
    return ShardedObject(
        "rng_state", [state], shape, place[: len(shape)], replica_id=rank if len(shape) < len(place) else 0
    )


def _generators(layout: Any, num_copies: int) -> tuple[int, ...]:
    """How many different states the processes' generators have, by pipeline, tensor and data parallel rank.

    Data and context parallel ranks, `num_copies` of them, only differ where they have different experts.
    """
    alike = (layout.pipeline_model_parallel_size, layout.tensor_model_parallel_size)
    return alike if getattr(layout, "expert_model_parallel_size", 1) == 1 else (*alike, num_copies)


def _set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
