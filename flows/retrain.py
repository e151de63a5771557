"""The pipeline with nobody at hand: at night, or when a data set was changed, and only if there is something new."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from configs.schema.run import RunConfig
from flows.last_success import Verdict, of_this_code, verdict
from flows.pipeline import pipeline
from tasks.embedded_server import end_server_with_this_process
from tasks.preflight import check_run


@flow(name="retrain", flow_run_name="{run.name}")
def retrain(run: RunConfig) -> Any:
    """Run the pipeline if data, model, settings or code have changed since it last went well.

    Otherwise the run is Skipped, and its state says since when nothing has changed.

    Args:
        run: The run, as in `configs/runs/*.yaml`. Its name tells which earlier runs it is compared with.

    Raises:
        InputError: The run can't work, as when a data file is damaged; what was published before stays.
        GateError: A proof, the evaluation or the comparison said no; likewise.
        PipelineError: A stage failed.
    """
    run = of_this_code(run)
    found = changes(run)
    if not found.is_due:
        return Completed(name="Skipped", message=found.why)
    # In this flow run, not in one below it: a cancel, and a wait for somebody's approval, mean the run that people see.
    return pipeline.fn(run)


@task(name="changes", cache_policy=NO_CACHE, persist_result=False)
def changes(run: RunConfig) -> Verdict:
    """What is other now than when the run last went well."""
    end_server_with_this_process()
    found = verdict(check_run(run))
    get_run_logger().info("%s: %s", "to be run" if found.is_due else "skipped", found.why)
    return found
