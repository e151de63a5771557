"""Training on other machines than the flow's own, or on more: what they are told, and how it is watched."""

from __future__ import annotations

from pathlib import Path

import yaml

from mcore.artifacts import digest_of
from mcore.folders import write_durably
from mcore.launchers.orders import Orders, job_folder
from mcore.metrics import FILE_NAME as METRICS_FILE
from tasks.stage import METRICS, Job


def orders_for(job: Job, module: str, *arguments: str) -> Orders:
    """Write the orders of a stage's job into the store, with the run beside them.

    Args:
        job: The stage's.
        module: What is run on every machine, under torchrun. Its first argument is the run.
        arguments: What comes behind that.
    """
    launch = job.run.launch
    folder = job_folder(job.output)
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "run.yaml"
    write_durably(run_file, yaml.safe_dump(job.run.model_dump(mode="json"), sort_keys=False))
    digest = digest_of({"folder": str(folder)})  # of the place too: two stores may be filled by one scheduler
    orders = Orders(
        folder=folder,
        name=f"mcore-flows-{digest[:16]}",
        launcher=launch.launcher,
        nnodes=launch.nnodes,
        nproc_per_node=launch.nproc_per_node,
        python=launch.kubernetes.python if launch.kubernetes is not None else job.interpreter,
        command=("-m", module, str(run_file), *arguments),
        cwd=str(Path.cwd()),
        grace_s=launch.grace_s,
        stall_timeout_s=launch.stall_timeout_s,
        progress=(job.output / METRICS_FILE, job.output),
        done_file=job.output / METRICS,
        join_timeout_s=launch.join_timeout_s,
        rdzv_endpoint=launch.rdzv_endpoint,
        socket_ifname=launch.socket_ifname,
        slurm=launch.slurm,
        kubernetes=launch.kubernetes,
    )
    orders.write()
    return orders
