"""`promote`: an alias of the registry moves to the model, if every gate passed and it is better than production's."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from prefect.blocks.system import Secret

from configs.schema.promote import TOKEN_VARIABLES, PromoteConfig
from mcore.artifacts import ArtifactRef, Store, digest_of
from mcore.errors import ConfigError, Problem
from mcore.registry.aliases import Registry
from mcore.registry.approval import read_request
from mcore.registry.promotion import Decision
from mcore.registry.promotion import promote as promote_model
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
        token = {TOKEN_VARIABLES[config.push[:2]]: hub_token(config)}
        job.python("mcore.registry", "push", "--folder", folder, "--to", config.push, env=token)
    job.say(f"{config.alias} of {name}: {'promoted' if decision.promoted else 'not promoted'}: {decision.reason}")
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / DECISION).write_text(
        json.dumps(asdict(decision) | {"figures": dict(decision.figures)}, indent=2) + "\n"
    )
    figures = {"promoted": decision.promoted, "reason": decision.reason, "alias": decision.alias, **decision.figures}
    (job.output / METRICS).write_text(json.dumps(figures, indent=2) + "\n")


def hub_token(config: PromoteConfig) -> str:
    """The token for `promote.push`, which is in no parameter: of a Prefect Secret block, or of the environment.

    Raises:
        ConfigError: There is none.
    """
    assert config.push is not None
    variable = TOKEN_VARIABLES[config.push[:2]]
    if config.push_secret is None:
        token, place = os.environ.get(variable, ""), f"the environment variable {variable}"
    else:
        place = f"the Prefect Secret block {config.push_secret}"
        try:
            token = str(Secret.load(config.push_secret).get())  # type: ignore[union-attr]
        except ValueError:  # no such block
            token = ""
    if not token:
        raise ConfigError(
            "the model is promoted, but not pushed", [Problem(place, f"a token for {config.push}", "none")]
        )
    return token
