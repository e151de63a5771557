"""Cut from the pipeline: how a base model does on a suite, before anybody trains it."""

from __future__ import annotations

from prefect import flow

from configs.schema.run import RunConfig
from mcore.errors import ConfigError
from tasks.evaluate import evaluate_base
from tasks.fetch import fetch
from tasks.plan import plan
from tasks.stage import Outcome
from tasks.turn import alone


@flow(name="evaluate-only", flow_run_name="{run.name}")
def evaluate_only(run: RunConfig) -> tuple[Outcome, ...]:
    """Answer the suite of a run with its base model. The pipeline finds the answers in the store afterwards.

    Args:
        run: The run, as in `configs/runs/*.yaml`.

    Raises:
        ConfigError: The run has no evaluation.
    """
    if run.evaluate is None:
        raise ConfigError("nothing to evaluate", ["the run has no group 'evaluate'"])
    planned = plan(run)
    with alone(planned):
        evaluate_base(planned, model=planned.local_model or fetch(planned))
    return tuple(planned.outcomes)
