"""`mcore-flows node`: the other machines of a run that is spread over several without a scheduler."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flows.cli_plan import RUNS
from flows.run_options import Overrides, RunFile, StoreFolder, all_overrides
from mcore.devices import installed_gpus, visible
from mcore.errors import ConfigError, Problem
from mcore.launchers.member import join
from mcore.launchers.orders import job_folder
from mcore.train.stop import stop_on_signals
from tasks.preflight import check_run_file
from tasks.preflight.devices import count_problems, request_of

node_commands = typer.Typer()


@node_commands.command(rich_help_panel=RUNS)
def node(
    run_file: RunFile,
    node_rank: Annotated[
        int, typer.Option(min=1, envvar="NODE_RANK", help="Number of this machine; the flow runs on number 0.")
    ],
    overrides: Overrides = None,
    store: StoreFolder = None,
) -> None:
    """Take part in the training of a run that was started on another machine (launch.nnodes, launcher: local).

    Started before or behind it, with the same run file, and left alone: it joins again whenever training is started
    again, and ends when that is complete. Its devices are held while it takes part.
    """
    os.environ.pop("NODE_RANK", None)  # what is checked is the run, whose flow is on machine 0
    checked = check_run_file(run_file, all_overrides(overrides, store), ask_source=False)
    launch = checked.run.launch
    problems = []
    if launch.launcher != "local" or launch.nnodes == 1:
        fix = "Other launchers start their machines themselves."
        found = f"launcher: {launch.launcher}, nnodes: {launch.nnodes}"
        problems.append(Problem("launch", "launcher: local and nnodes of at least 2", found, fix))
    elif node_rank >= launch.nnodes:
        problems.append(Problem("--node-rank", f"from 1 to {launch.nnodes - 1} (launch.nnodes)", str(node_rank)))
    problems += count_problems(launch, visible(installed_gpus()), {"launch.nproc_per_node": launch.nproc_per_node})
    if problems:
        raise ConfigError("this machine has no place in the run", problems)
    (plan,) = (one for one in checked.stages if one.name == "train")
    with stop_on_signals() as stop:
        status = join(
            job_folder(checked.store.partial(plan.kind, plan.key)),
            node_rank,
            stop,
            lambda: checked.store.find(plan.kind, plan.key) is not None,
            request_of(launch, launch.nproc_per_node, f"run {checked.run.name}, machine {node_rank}"),
        )
    raise typer.Exit(status)
