"""`promote`: an alias of the registry moves to the model, if every gate passed and it is better than production's."""

from __future__ import annotations

import json
from dataclasses import asdict

from configs.schema.promote import PromoteConfig
from mcore.artifacts import ArtifactRef, Store, digest_of
from mcore.errors import ConfigError, PipelineError, Problem
from mcore.registry.aliases import Registry
from mcore.registry.approval import read_request
from mcore.registry.gates import evidence
from mcore.registry.promotion import Decision, judge
from mcore.registry.promotion import promote as promote_model
from tasks.hub_token import hub_token, token_place, token_variable
from tasks.stage import METRICS, Job, stage

DECISION = "decision.json"


@stage("promote")
def promote(
    job: Job, *, model: ArtifactRef, base_proof: ArtifactRef, proof: ArtifactRef, comparison: ArtifactRef
) -> None:
    """Decide once, and keep the decision: a run that is started again does not undo what was rolled back since.

    The alias moves before the decision is kept. A run that is killed between the two finds the alias moved.
    """
    config, name = job.run.promote, job.run.promoted_as
    assert config is not None
    store = Store(job.run.launch.store)
    registry = Registry(store, name)
    given = {
        role: f"{ref.kind}/{ref.key}"
        for role, ref in {"base_proof": base_proof, "proof": proof, "comparison": comparison}.items()
    }
    artifact = f"{model.kind}/{model.key}"
    request = read_request(registry, digest_of(job.ingredients)) if config.approval else None
    if config.approval and request is None:
        _refuse_unasked(judge(store, registry, config.alias, evidence(store, artifact, given=given), by_itself=True))
    if request is not None and request.answer != "approved":
        there = registry.release(config.alias)
        before = None if there is None else there.artifact
        decision = Decision(False, request.verdict, config.alias, name, artifact, before)
    else:
        decision = promote_model(
            store, artifact, config.alias, model=name, given=given, run=job.run.name,
            agreed=None if request is None else request.verdict, by_itself=True,
        )  # fmt: skip
    store.digests.save()
    if decision.promoted and config.push is not None:
        folder = registry.link(config.alias).resolve()
        token = {token_variable(config.push): _token(config)}
        job.python("mcore.registry", "push", "--folder", folder, "--to", config.push, env=token)
    job.say(f"{config.alias} of {name}: {'promoted' if decision.promoted else 'not promoted'}: {decision.reason}")
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / DECISION).write_text(
        json.dumps(asdict(decision) | {"figures": dict(decision.figures)}, indent=2) + "\n"
    )
    figures = {"promoted": decision.promoted, "reason": decision.reason, "alias": decision.alias, **decision.figures}
    (job.output / METRICS).write_text(json.dumps(figures, indent=2) + "\n")


def _refuse_unasked(decision: Decision) -> None:
    """Nobody is asked about a model that would not be promoted; what is in production may have changed since then.

    Raises:
        PipelineError: It would be promoted now.
    """
    if decision.promoted and decision.before != decision.artifact:
        raise PipelineError(
            "nobody was asked whether the model may be promoted",
            [Problem(decision.artifact, "an answer", "no question", "Start the run again; it asks then.")],
        )


def _token(config: PromoteConfig) -> str:
    assert config.push is not None
    token = hub_token(config.push, config.push_secret)
    if not token:
        place = token_place(config.push, config.push_secret)
        raise ConfigError(
            "the model is promoted, but not pushed", [Problem(place, f"a token for {config.push}", "none")]
        )
    return token
