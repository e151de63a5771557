"""Whether this machine can do what a run is about to ask of it; only for stages that will really run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.schema.run import RunConfig
from mcore.artifacts import Store
from mcore.devices import Gpu, installed_gpus, visible
from mcore.environment import torch_cuda
from mcore.errors import Problem
from tasks.graph import StagePlan
from tasks.preflight.devices import count_problems, memory_problems, request_of
from tasks.preflight.loopback import loopback_problems
from tasks.preflight.store import room_problems, write_problems
from tasks.preflight.versions import driver_problems, package_problems
from tasks.preflight.vllm import environment_of


def stages_to_run(run: RunConfig, plans: Sequence[StagePlan], store: Store) -> set[str]:
    """Names of stages whose artifact is not there; of all that may be, if no key can be told yet."""
    if not plans:
        evaluations = {"evaluate_base", "evaluate_tuned"} if run.evaluate is not None else set()
        return {"convert", "train", "export"} | evaluations
    return {plan.name for plan in plans if store.find(plan.kind, plan.key) is None}


def machine_problems(
    run: RunConfig,
    plans: Sequence[StagePlan],
    store: Store,
    hf_config: Mapping[str, Any] | None,
    weights: Path | None,
) -> list[Problem]:
    """Everything that is wrong with the machine.

    Args:
        run: The run.
        plans: Its stages, if their keys could be told.
        store: Where artifacts come.
        hf_config: The model's `config.json`, if it is at hand.
        weights: The model's folder, if it is there.
    """
    runs = stages_to_run(run, plans, store)
    if not runs:
        return []
    problems = write_problems(store.root) + package_problems()
    training = next((plan for plan in plans if plan.name == "train"), None)
    if hf_config is not None:
        problems += room_problems(run, hf_config, weights, store, runs=runs, training=training)
    trains_here = "train" in runs and run.launch.is_single_machine
    needs = {"launch.nproc_per_node": run.launch.nproc_per_node} if trains_here else {}
    if run.evaluate is not None and runs & {"evaluate_base", "evaluate_tuned"}:
        needs["evaluate.tensor_parallel_size"] = run.evaluate.tensor_parallel_size
    if not needs:
        return problems
    all_gpus = visible(installed_gpus())
    counting = count_problems(run.launch, all_gpus, needs)
    problems += counting
    gpus = [gpu for gpu in all_gpus if run.launch.devices is None or gpu.index in run.launch.devices]
    if trains_here:
        problems += driver_problems(gpus, torch_cuda(), "train")
        if hf_config is not None and not counting:
            problems += memory_problems(run, hf_config, gpus, engine=uses_engine(run, gpus))
    if run.evaluate is not None and "evaluate.tensor_parallel_size" in needs:
        found = environment_of(run.evaluate.python)
        if not isinstance(found, str) and found["torch"]:  # else said with the group
            problems += driver_problems(gpus, found["cuda"], f"evaluate.python: {run.evaluate.python}")
    return problems


def collective_problems(
    run: RunConfig, plans: Sequence[StagePlan], store: Store, say: Callable[[str], None]
) -> list[Problem]:
    """Whether the processes of a training that will run here can talk to each other; takes seconds, so it comes last.

    Args:
        run: A run without other problems.
        plans: Its stages.
        store: Where artifacts come.
        say: Takes a line for the log.
    """
    count, wanted = run.launch.nproc_per_node, run.launch.check_collectives
    trains_here = run.launch.is_single_machine and "train" in stages_to_run(run, plans, store)
    if wanted == "never" or count == 1 or not trains_here:
        return []
    if wanted == "auto" and not visible(installed_gpus()):
        return []
    return loopback_problems(request_of(run.launch, count, f"run {run.name}, preflight"), say)


def uses_engine(run: RunConfig, gpus: Sequence[Gpu]) -> bool:
    """Whether layers are Transformer Engine's."""
    has_engine = bool(gpus) and importlib.util.find_spec("transformer_engine") is not None
    return run.train.backend == "transformer_engine" or (run.train.backend == "auto" and has_engine)
