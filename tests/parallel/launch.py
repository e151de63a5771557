"""torchrun in tests: one launch runs many checks, and its whole process tree ends with it, whatever happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from mcore.launch import run

REPOSITORY = Path(__file__).parents[2]


def run_torchrun(
    nproc: int,
    script: Path | str,
    *args: object,
    folder: Path,
    timeout_s: float = 240,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a script, or a module as `-m name`, on processes of this machine; returns all their output.

    Args:
        nproc: Number of processes.
        script: A file, or a module's name.
        args: Arguments of the script.
        folder: Gets the log and the error document.
        timeout_s: Seconds after which the whole tree is ended and the test fails.
        env: Further environment variables.

    Raises:
        PipelineError: What the script raised, if it runs as a stage (`mcore.child.run_as_child`).
        LaunchError: It failed otherwise; carries the end of its output.
    """
    log = folder / f"{Path(script).stem}.log"
    target = [script] if isinstance(script, Path) else ["-m", script]
    run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc_per_node", str(nproc), *target, *map(str, args)],
        log_path=log,
        error_file=folder / "error.json",
        timeout_s=timeout_s,
        grace_s=5,
        cwd=REPOSITORY,
        env={
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            **(env or {}),
        },
    )  # fmt: skip
    return log.read_text()
