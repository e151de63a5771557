"""What a run would do and why, and what that takes, told before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from flows.estimates import Estimate, estimate
from flows.nearest import Earlier, Nearest
from mcore.artifacts import Manifest, Status, Store
from mcore.errors import CheckpointError
from mcore.runs import RunRecord, maker, records
from mcore.select import select_checkpoint
from tasks.differences import reasons
from tasks.graph import StagePlan
from tasks.preflight import CheckedRun

Action = Literal["RUN", "REUSE", "BLOCKED"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a run would do at one stage.

    Attributes:
        stage: The stage.
        action: `RUN`, `REUSE`, or `BLOCKED` where a gate in front of it has said no to just this.
        why: The reason, in words.
        nearest: The earlier artifact that is most like what would be made; None of what is reused.
        estimate: What running it takes; None of what is reused, and where nothing like it was made before.
    """

    stage: StagePlan
    action: Action
    why: str
    nearest: Nearest | None = None
    estimate: Estimate | None = None


def decide(checked: CheckedRun) -> list[Decision]:
    """What a run would do at each of its stages, in their order."""
    earlier = Earlier(checked)
    content = {name: manifest.content for name, manifest in earlier.by_name.items()}
    rejected = _rejected(checked.store, earlier.by_name)
    decisions = []
    blocked: dict[str, str] = {}
    for stage in checked.stages:
        decision = _decide(stage, checked.store, earlier, content)
        behind = next((blocked[artifact] for artifact in stage.inputs.values() if artifact in blocked), None)
        if decision.action == "RUN" and behind is not None:
            decision = Decision(stage, "BLOCKED", f"behind {behind}", decision.nearest, decision.estimate)
            blocked[stage.artifact] = behind
        elif decision.action == "RUN" and stage.artifact in rejected:
            failed = rejected[stage.artifact]
            assert failed.failure is not None
            why = f"asked again: it said no on {failed.started[:16].replace('T', ' ')} UTC ({failed.failure.summary})"
            decision = Decision(stage, "RUN", why, decision.nearest, decision.estimate)
            blocked[stage.artifact] = f"{stage.name}, which has said no to just this"
        decisions.append(decision)
    if checked.store.root.is_dir():  # a plan makes no store, but what it hashed need not be hashed again
        checked.store.digests.save()
    return decisions


def _rejected(store: Store, made: Mapping[str, Manifest]) -> dict[str, RunRecord]:
    """Artifacts that are not there because a gate said no, by the newest attempts of all runs."""
    return {
        record.failure.artifact: record
        for record in records(store)
        if record.state == "rejected"
        and record.failure is not None
        and record.failure.artifact is not None
        and record.failure.artifact not in made
    }


def _decide(stage: StagePlan, store: Store, earlier: Earlier, now: Mapping[str, str]) -> Decision:
    status = store.status(stage.kind, stage.key)
    why = _why_made_again(stage, status, now)
    if why is None:
        assert status.manifest is not None
        return Decision(stage, "REUSE", f"made {status.manifest.created[:16].replace('T', ' ')} UTC")
    # Of one that is damaged or outdated, itself is most like what would be made, as all went into its key.
    nearest = earlier.nearest(stage)
    done = _done_iterations(stage, store)
    if status.state == "missing":
        why = status.why
        if earlier.is_new_run:
            why = "new run"
        elif nearest is not None:
            why = "; ".join(reasons(nearest.differences)) or why
    notes = [f"goes on from iteration {done}"] if done is not None else []
    if (claim := maker(store, stage.kind, stage.key)) is not None:
        notes.append(f"{f'run {claim.run}' if claim.run else 'another run'} is making it now")
    return Decision(
        stage, "RUN", "; ".join([why, *notes]), nearest, estimate(stage, nearest, done_iterations=done or 0)
    )


def _why_made_again(stage: StagePlan, status: Status, now: Mapping[str, str]) -> str | None:
    """Why what is there does not do, or that it is not there; None if it is reused."""
    if status.manifest is None:
        return f"damaged: {status.why}" if status.state == "damaged" else status.why
    inputs: Mapping[str, str] = stage.ingredients["inputs"]
    content = {role: now[artifact] for role, artifact in inputs.items() if artifact in now}
    outdated = status.manifest.outdated_inputs(content)
    return f"its input {', '.join(outdated)} was made again and is another now" if outdated else None


def _done_iterations(stage: StagePlan, store: Store) -> int | None:
    """How far an interrupted training run has come."""
    if stage.kind != "train":
        return None
    try:
        iteration = select_checkpoint(store.partial(stage.kind, stage.key)).iteration
    except CheckpointError:
        return None
    return iteration if isinstance(iteration, int) else None


def totals(decisions: list[Decision]) -> tuple[float, int, list[str]]:
    """Seconds and bytes of all that would run, and the names of stages that nothing is known of."""
    running = [decision for decision in decisions if decision.action != "REUSE"]
    known = [decision.estimate for decision in running if decision.estimate is not None]
    unknown = [decision.stage.name for decision in running if decision.estimate is None]
    return sum(one.seconds for one in known), sum(one.num_bytes for one in known), unknown


def edges(decisions: list[Decision]) -> Iterator[tuple[str, str]]:
    """Which stage of a run feeds or vouches for which, by their names."""
    made_by = {decision.stage.artifact: decision.stage.name for decision in decisions}
    for decision in decisions:
        for artifact in dict.fromkeys(decision.stage.inputs.values()):
            if artifact in made_by:
                yield made_by[artifact], decision.stage.name
