"""`publish`: the proven model becomes the run's result. The last task of a run, behind every gate."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mcore.artifacts import ArtifactRef, publish_link
from mcore.runs import LINK
from tasks.stage import PlannedRun


@task(name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(planned: PlannedRun, model: ArtifactRef) -> str:
    """Point `<store>/runs/<name>/model` at the exported model, in one step; a reader sees the old model or the new one.

    A run that fails does not come here, so what an earlier run published stays.
    """
    link = planned.store.run_dir(planned.run.name) / LINK
    publish_link(link, Path(model.path))
    return str(link)
