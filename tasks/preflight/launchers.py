"""Whether the launcher of a run can do what it is asked for, from here."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from configs.schema.cluster import SAFE_PATH
from configs.schema.launch import LaunchConfig
from mcore.errors import Problem

PROGRAMS = {"local": (), "slurm": ("sbatch", "squeue", "scancel", "scontrol"), "kubernetes": ("kubectl",)}
"""What is called where the flow runs; Slurm's accounting (`sacct`) may be missing."""


def launcher_problems(launch: LaunchConfig) -> list[Problem]:
    """What keeps the run's launcher from starting its machines."""
    problems = [
        Problem(f"launch.launcher: {launch.launcher}", f"the program {name} on this machine", "none", _where(launch))
        for name in PROGRAMS[launch.launcher]
        if shutil.which(name) is None
    ]
    if launch.is_single_machine:
        return problems
    rank = os.environ.get("NODE_RANK", "0")
    if launch.launcher == "local" and rank != "0":
        fix = "The flow runs on machine 0; here, run `mcore-flows node` with the same run file."
        problems.append(Problem("NODE_RANK", "0, or unset, where the flow runs", rank, fix))
    store = str(Path(launch.store).absolute())
    for name, path in (("launch.store", store), ("the working directory", str(Path.cwd()))):
        if launch.launcher != "local" and not re.fullmatch(SAFE_PATH, path):
            expected = "a path of letters, digits and . _ - + = @ , /, as it goes into the job's file"
            problems.append(Problem(name, expected, path))
    settings = launch.kubernetes
    if settings is not None and not Path(store).is_relative_to(settings.mount_path):
        fix = "Put the store on the volume, mounted at the same path here and in the pods."
        problems.append(Problem("launch.store", f"a folder below {settings.mount_path} (mount_path)", store, fix))
    return problems


def _where(launch: LaunchConfig) -> str:
    return "Run the flow on a login node." if launch.launcher == "slurm" else "Install it, with a configuration."
