"""Whether this machine has the devices that a run asks for, and whether those have the memory for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from configs.schema.launch import LaunchConfig
from configs.schema.run import RunConfig
from mcore.devices import Device, Gpu, Request, devices_for, holders
from mcore.errors import PipelineError, Problem
from mcore.train.memory import StageMemory, estimate

GIB = 2**30
_MORE = "Use fewer processes, or a machine with more."
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def request_of(launch: LaunchConfig, count: int, holder: str) -> Request:
    """Devices of this machine for some processes, from those that the run may take."""
    return Request(count, Path(launch.device_locks), holder, launch.devices, launch.device_slots)


def count_problems(launch: LaunchConfig, gpus: Sequence[Gpu], needs: Mapping[str, int]) -> list[Problem]:
    """Whether there are as many devices as are asked for, and those that are named.

    Args:
        launch: What may be taken.
        gpus: What this machine has.
        needs: How many each field asks for, of the stages that will run.
    """
    if not needs:
        return []
    devices = devices_for(gpus, launch.device_slots)
    if not devices:
        if launch.devices is None:
            return []
        fix = "Leave launch.devices out, or set launch.device_slots to count processes."
        return [Problem("launch.devices", "GPUs on this machine", "none", fix)]
    kind = "GPU" if gpus else "slot"
    there = {device.index for device in devices}
    listed = ", ".join(map(str, sorted(there)))
    problems = [
        Problem(f"launch.devices: {number}", f"a {kind} of this machine ({listed})", "none", "Name one that is there.")
        for number in sorted(set(launch.devices or ()) - there)
    ]
    usable = there if launch.devices is None else there & set(launch.devices)
    source = "launch.devices" if launch.devices is not None else "this machine" if gpus else "launch.device_slots"
    return problems + [
        Problem(f"{field} ({count})", f"at most the {kind}s that {source} has ({len(usable)})", str(count), _MORE)
        for field, count in needs.items()
        if count > len(usable)
    ]


def memory_problems(
    run: RunConfig, hf_config: Mapping[str, Any], gpus: Sequence[Gpu], *, engine: bool
) -> list[Problem]:
    """Whether the tensors of training alone, as estimated, are more than the devices or the host have.

    Args:
        run: The run; its training is about to run here.
        hf_config: The model's `config.json`.
        gpus: GPUs that it may take; none if it runs on the CPU.
        engine: Whether layers are Transformer Engine's.
    """
    try:
        stages = estimate(run, hf_config, engine=engine, on_gpu=bool(gpus))
    except PipelineError:
        return []  # said with the model
    return _gpu_memory(run, stages, gpus) + _offloaded(run, stages) if gpus else _host_memory(run, stages)


FIX = "Divide the model further, recompute activations, or take a smaller micro-batch (`mcore-flows plan` shows parts)."


def _gpu_memory(run: RunConfig, stages: Sequence[StageMemory], gpus: Sequence[Gpu]) -> list[Problem]:
    needed, count = max(stage.tensors for stage in stages) / GIB, run.launch.nproc_per_node
    large = [gpu for gpu in gpus if gpu.total_gib >= needed]
    what = f"a training process, estimated at {needed:.1f} GiB of tensors"
    if len(large) < count:
        found = f"{len(large)} of {len(gpus)}, the largest has {max(gpu.total_gib for gpu in gpus):.1f} GiB"
        return [Problem(what, f"{count} GPU{'s' * (count > 1)} that can hold it", found, FIX)]
    leased = holders(Path(run.launch.device_locks), [Device(gpu.index, gpu.uuid, True) for gpu in gpus])
    foreign = [gpu for gpu in large if gpu.index not in leased and gpu.free_gib < needed]
    if len(large) - len(foreign) >= count:
        return []  # what is leased comes free, and is waited for
    found = ", ".join(f"GPU {gpu.index}: {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB" for gpu in foreign)
    fix = "End what uses them without a lease (nvidia-smi), or name others (launch.devices)."
    return [Problem(what, f"{count} GPU{'s' * (count > 1)} with that much free", found, fix)]


def _offloaded(run: RunConfig, stages: Sequence[StageMemory]) -> list[Problem]:
    needed, total = _of_all_processes(run, [stage.host for stage in stages]), host_memory()
    if needed <= total:
        return []
    what = f"train.optimizer_cpu_offload with {run.launch.nproc_per_node} processes"
    fix = "Offload less of it (train.optimizer_offload_fraction), or take a host with more."
    return [Problem(what, f"{needed / GIB:.1f} GiB of the host's memory", f"{total / GIB:.1f} GiB", fix)]


def _of_all_processes(run: RunConfig, of_stages: Sequence[float]) -> float:
    return sum(of_stages) * run.launch.nproc_per_node / len(of_stages)


def _host_memory(run: RunConfig, stages: Sequence[StageMemory]) -> list[Problem]:
    needed, total = _of_all_processes(run, [stage.tensors for stage in stages]), host_memory()
    if needed <= total:
        return []
    what = f"training on the CPU with {run.launch.nproc_per_node} processes"
    return [Problem(what, f"{needed / GIB:.1f} GiB of memory, as estimated", f"{total / GIB:.1f} GiB", FIX)]


def host_memory() -> int:
    """Bytes of memory that this machine has, or that its control group may take, if that is less."""
    total = int(psutil.virtual_memory().total)
    for path in map(Path, CGROUP_LIMITS):
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return total
