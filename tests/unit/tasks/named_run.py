"""A run called `named` of one stage, as a process: `python named_run.py STORE KEY CODE`.

The stage's command writes its process id into the output folder, and runs the code.
"""

import sys
from pathlib import Path

from prefect import flow

from configs.schema.run import RunConfig
from mcore.artifacts import Store
from tasks.graph import StagePlan
from tasks.stage import Job, PlannedRun, stage
from tasks.turn import alone

PRELUDE = "import os, sys, time, pathlib\nout = pathlib.Path(sys.argv[1])\nout.mkdir(parents=True, exist_ok=True)\n"


@stage("work")
def work(job: Job) -> None:
    """Makes the output folder by the code that the run's model source holds."""
    job.launch([sys.executable, "-S", "-c", PRELUDE + job.run.model.source, str(job.output)])


@flow(name="named")
def named_flow(planned: PlannedRun) -> None:
    with alone(planned):
        work(planned)


if __name__ == "__main__":
    store, key, code = sys.argv[1:]
    run = RunConfig.model_validate(
        {
            "name": "named",
            "model": {"source": code},
            "data": {"dataset": ["none.jsonl"]},
            "train": {"train_iters": 1},
        }
    )
    plans = {"work": StagePlan("work", "work", key, {"inputs": {}}, {})}
    named_flow(PlannedRun(run, Store(Path(store)), plans))
    sys.stdout.write("done\n")
