"""Somebody has to agree before an alias moves: the run asks, and nothing of it holds a GPU or a worker meanwhile.

A run of a deployment is suspended, with the question as a form in the UI; its process ends, and when it is answered
the run starts again, finds all its stages in the store, and promotes or not. Any other run waits for the answer in a
file of the registry. `mcore-flows approve` and `reject` answer both.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from prefect import get_run_logger
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from pydantic import Field

from mcore.artifacts import ArtifactRef
from mcore.evaluate.report import PAGE
from mcore.registry.aliases import Registry
from mcore.registry.approval import Request, ask, read_request
from mcore.registry.approval import answer as answer_request
from mcore.registry.gates import evidence
from mcore.registry.promotion import judge
from tasks.stage import PlannedRun
from tasks.watch import watched

POLL_S = 0.5
WORDS: dict[str, Literal["approved", "rejected"]] = {"approve": "approved", "reject": "rejected"}


class PromotionForm(RunInput):
    """The form that is shown in the UI."""

    answer: Literal["approve", "reject"] = Field(description="Whether the alias may move to this model.")
    reason: str = Field(default="", description="Why; kept in the history of the alias.")


class Asked(Pause):
    """The flow run is suspended; the record of the run tells what it waits for."""

    def __init__(self, pause: Pause, request: Request) -> None:
        said = f"`mcore-flows approve {request.run}` or `mcore-flows reject {request.run}`"
        self.summary = f"waits for an answer ({said}); none until {request.until} means no"
        super().__init__(self.summary, state=pause.state)


def agreed(
    planned: PlannedRun, *, model: ArtifactRef, base_proof: ArtifactRef, proof: ArtifactRef, comparison: ArtifactRef
) -> None:
    """Ask whether the model may be promoted, and come back with an answer in the registry.

    Nobody is asked about a model that would not be promoted anyhow, nor about one that was decided on before.

    Raises:
        Asked: The flow run is suspended.
        GateError: A gate did not pass.
    """
    config, plan = planned.run.promote, planned.plans["promote"]
    assert config is not None
    if not config.approval or planned.store.find(plan.kind, plan.key) is not None:
        return
    registry = Registry(planned.store, planned.run.promoted_as)
    request = read_request(registry, plan.key)
    if request is None:
        named = {"base_proof": base_proof, "proof": proof, "comparison": comparison}
        given = {role: f"{ref.kind}/{ref.key}" for role, ref in named.items()}
        new = evidence(planned.store, f"{model.kind}/{model.key}", given=given)
        decision = judge(planned.store, registry, config.alias, new, by_itself=True)
        if not decision.promoted or decision.before == decision.artifact:
            return
        summary = decision.reason
    else:
        summary = request.summary
    is_deployed = deployment.id is not None
    request = ask(
        registry, plan.key, run=planned.run.name, alias=config.alias, artifact=f"{model.kind}/{model.key}",
        summary=summary, timeout_s=config.timeout_s, flow_run=str(flow_run.id) if is_deployed else None,
    )  # fmt: skip
    if is_deployed:
        _suspend(planned, registry, request, comparison)
    else:
        _wait(registry, request)


def _suspend(planned: PlannedRun, registry: Registry, request: Request, comparison: ArtifactRef) -> None:
    """End this process until somebody answers. Comes back at once if that was before."""
    if not request.is_open:
        return
    page = f"{_question(registry, request)}\n\n{_page(Path(comparison.path))}"
    form = PromotionForm.with_initial_data(description=page)
    timeout_s = max(1, round(request.left_s))
    try:
        given = suspend_flow_run(wait_for_input=form, timeout=timeout_s, key=f"promote-{request.key}")
    except Pause as pause:
        raise Asked(pause, request) from pause
    now = read_request(registry, request.key)
    if given is not None and now is not None and now.is_open:
        answer_request(registry, request.key, WORDS[given.answer], reason=given.reason, by="the form in Prefect")


def _wait(registry: Registry, request: Request) -> None:
    if request.is_open:
        get_run_logger().info("%s", _question(registry, request))
    with watched() as watch:
        while request is not None and request.is_open:
            if watch is not None:
                watch.check()
            time.sleep(POLL_S)
            found = read_request(registry, request.key)
            if found is None:
                return
            request = found


def _question(registry: Registry, request: Request) -> str:
    return (
        f"May {request.alias} of {registry.model} move to {request.artifact}? {request.summary}. "
        f"`mcore-flows approve {request.run}` or `mcore-flows reject {request.run}`; no answer until {request.until} "
        "means no"
    )


def _page(folder: Path) -> str:
    try:
        return (folder / PAGE).read_text()
    except OSError:
        return ""
