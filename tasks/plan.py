"""`preflight`: everything that can be known about a run before it starts, and a stop if any of it is wrong."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from configs.schema.model import ModelConfig
from configs.schema.run import RunConfig
from mcore.artifacts import ArtifactRef
from mcore.errors import InputError
from tasks.console_output import go_on_without_reader
from tasks.embedded_server import end_server_with_this_process
from tasks.graph import LOCAL
from tasks.preflight import check_run
from tasks.preflight.machine import collective_problems
from tasks.stage import PlannedRun


@task(name="preflight", cache_policy=NO_CACHE, persist_result=False)
def plan(run: RunConfig) -> PlannedRun:
    """Check the run, and give each of its stages a key.

    Raises:
        InputError: Everything that is wrong with it, at once.
    """
    end_server_with_this_process()
    go_on_without_reader()
    checked = check_run(run, here=True)
    source, store = checked.source, checked.store
    if problems := collective_problems(run, checked.stages, store, get_run_logger().info):
        raise InputError("the run can't be started: its processes can't talk to each other", problems)
    # A branch may move until fetch comes to it; the key was made for this commit.
    run = run.model_copy(update={"model": ModelConfig(source=source.pinned)})
    store.digests.save()
    plans = {stage.name: stage for stage in checked.stages}
    kind, _, key = plans["convert"].inputs["hf"].partition("/")
    local_model = ArtifactRef(kind, key, str(source.path)) if kind == LOCAL else None
    return PlannedRun(run, store, plans, local_model)
