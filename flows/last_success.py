"""What is other now than when a run last went well, by keys and digests; times say nothing about content."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema.run import RunConfig
from flows.plan import decide
from mcore.artifacts import Store
from mcore.runs import RunRecord, history
from mcore.wording import moment
from tasks.graph import STAGES
from tasks.preflight import CheckedRun
from tasks.versions import code_digest


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run has something to do, and why, in words."""

    is_due: bool
    why: str


def of_this_code(run: RunConfig) -> RunConfig:
    """The run with the code and the packages in the keys of all its stages but `fetch`.

    A run by hand reuses what a version before this one made, as long as the stages say that they work alike. One that
    nobody looks at is made anew: so a change of the code that was not meant to change a model, and does, is found out
    by the night's gates.
    """
    word = code_digest(None if run.evaluate is None else run.evaluate.python)
    again = {str(name): given for name, given in run.launch.again.items()}
    for stage in STAGES:
        is_in_run = run.evaluate is not None or stage.kind != "evaluate"
        if stage.inputs and set(stage.inputs.values()) == {"fetch"} and is_in_run:
            again[stage.name] = " ".join([f"code {word}", *([again[stage.name]] if stage.name in again else [])])
    launch = run.launch.model_dump(mode="json") | {"again": again}
    return RunConfig.model_validate(run.model_dump(mode="json") | {"launch": launch})


def last_success(store: Store, name: str) -> RunRecord | None:
    """The newest attempt of a run that came to its end, all gates passed; None if there is none."""
    return next((record for record in reversed(history(store, name)) if record.state == "done"), None)


def verdict(checked: CheckedRun) -> Verdict:
    """Whether the run would make anything else than it last did, and what is other.

    Keys hold the digests of all files that a run reads, its settings, the model's revision and, by `of_this_code`, the
    code. So a run whose keys are those of its last success, with all artifacts whole, has nothing to do.
    """
    before = last_success(checked.store, checked.run.name)
    if before is None:
        return Verdict(True, f"no run named {checked.run.name} has gone well yet")
    since = f"since the run of {moment(before.started)} UTC"
    then = {stage.name: stage.artifact for stage in before.stages}
    now = {stage.name: stage.artifact for stage in checked.stages}
    decisions = decide(checked)
    if then == now:
        lost = [f"{one.stage.artifact}: {one.why}" for one in decisions if one.action != "REUSE"]
        if lost:
            return Verdict(True, f"artifacts were lost {since}: {'; '.join(lost)}")
        return Verdict(
            False,
            f"nothing has changed {since}: data, settings, model and code have the digests of then, and all "
            f"{len(now)} artifacts are whole",
        )
    reasons = [
        f"{one.stage.name}: {one.why}"
        for one in decisions
        if one.action != "REUSE" and then.get(one.stage.name) != now[one.stage.name]
    ]
    return Verdict(True, f"changed {since}: {reasons[0] if reasons else 'back to what was made before that'}")
