"""A flow of one stage whose command is given by the test. Also run as a process: `python toy_flow.py STORE CODE`."""

import sys

from prefect import flow

from configs.schema.run import RunConfig
from mcore.artifacts import ArtifactRef, Store
from tasks.graph import StagePlan
from tasks.stage import Job, Outcome, PlannedRun, stage

PRELUDE = """
import os, signal, sys, time
out = sys.argv[1]
executions = os.path.join(out, "..", "..", "..", "executions")
with open(os.path.normpath(executions), "a") as file:
    file.write("x")
count = os.path.getsize(os.path.normpath(executions))
def write(name, text):
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, name), "w") as file:
        file.write(text)
def make():
    write("weights", "weights")
    write("metrics.json", '{"num_tensors": 7}')
"""
"""What the command starts with: it counts its executions beside the store, and can make an artifact."""


@stage("toy")
def toy(job: Job, *, given: ArtifactRef) -> None:
    """Makes the output folder by the code that the run's model source holds."""
    job.launch([sys.executable, "-S", "-c", PRELUDE + job.run.model.source, str(job.output)])


@flow(name="toy")
def toy_flow(planned: PlannedRun, given: ArtifactRef) -> None:
    toy(planned, given=given)


def run_toy(
    store: str, code: str, *, key: str = "0123456789abcdef0123", retries: int = 2, content: str = "one"
) -> Outcome:
    run = RunConfig.model_validate(
        {
            "name": "toys",
            "model": {"source": code},
            "data": {"dataset": ["none.jsonl"]},
            "train": {"train_iters": 1},
            "launch": {"retries": retries, "retry_delay_s": 0.1},
        }
    )
    inputs = {"given": "local/k"}
    planned = PlannedRun(run, Store(store), {"toy": StagePlan("toy", "toy", key, {"inputs": inputs}, inputs)})
    toy_flow(planned, ArtifactRef("local", "k", "nowhere", content=content))
    (outcome,) = planned.outcomes
    return outcome


if __name__ == "__main__":
    sys.stdout.write(f"cached={run_toy(sys.argv[1], sys.argv[2]).cached}\n")
