"""`preflight`: everything that can be known about a run before it starts, and a stop if any of it is wrong."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.schema.run import RunConfig
from mcore.artifacts import ArtifactRef, Store
from tasks.graph import LOCAL, stages
from tasks.preflight import check_run
from tasks.stage import PlannedRun


@task(name="preflight", cache_policy=NO_CACHE, persist_result=False)
def plan(run: RunConfig) -> PlannedRun:
    """Check the run, and give each of its stages a key.

    Raises:
        InputError: Everything that is wrong with it, at once.
    """
    checked = check_run(run)
    store = Store(checked.run.launch.store)
    plans = {stage.name: stage for stage in stages(checked.run, checked.source, store)}
    store.digests.save()
    kind, _, key = plans["convert"].inputs["hf"].partition("/")
    local = ArtifactRef(kind, key, str(Path(str(checked.source.path)).absolute())) if kind == LOCAL else None
    return PlannedRun(checked.run, store, plans, local_model=local)
