"""The decision: gates, the comparison with production, the move, the card. The same for a run and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from configs.schema.promote import Alias
from mcore.artifacts import Store
from mcore.errors import GateError, Problem
from mcore.registry.aliases import Registry
from mcore.registry.better import compare_with_production
from mcore.registry.card import card
from mcore.registry.gates import Evidence, evidence, named
from mcore.registry.release import Release, card_digest, make_release, release_problems

PRODUCTION: Alias = "production"
NO_FIGURES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a promotion.

    Attributes:
        promoted: Whether the alias points to the model now.
        reason: Why, or why not.
        alias: The alias.
        model: Name in the registry.
        artifact: `export/key` of the model.
        before: `export/key` of what the alias pointed to; None if to nothing.
        figures: The comparison with production, if there was one to make.
    """

    promoted: bool
    reason: str
    alias: Alias
    model: str
    artifact: str
    before: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def judge(store: Store, registry: Registry, alias: Alias, new: Evidence, *, by_itself: bool) -> Decision:
    """Whether a model would be promoted, before anybody is asked and nothing moves.

    Args:
        store: The store.
        registry: The registry of the model.
        alias: The alias that would move.
        new: The model, which has passed its gates.
        by_itself: No person asks for it: a model that was rolled back before stays where it is.
    """
    points_to = _release(registry, alias)
    before = None if points_to is None else points_to.artifact

    def decide(promoted: bool, reason: str, figures: Mapping[str, Any] = NO_FIGURES) -> Decision:
        return Decision(promoted, reason, alias, registry.model, new.artifact, before, figures)

    if points_to is not None and points_to.content == new.model.content:
        if points_to.artifact == new.artifact:
            return decide(True, f"{alias} is this model already")
        return decide(False, f"{alias} has these weights already, as {points_to.artifact}")
    taken = registry.rolled_back(alias, new.model.content) if by_itself else None
    if taken is not None:
        reason = f"it was rolled back by {taken.by} at {taken.time}; `mcore-flows promote` brings it back"
        return decide(False, reason)
    production = _release(registry, PRODUCTION)
    if production is None:
        name = registry.points_to(PRODUCTION)
        if name is not None:
            return decide(False, f"what production points to can't be read: {name}")
        return decide(True, "every gate passed, and nothing is in production")
    if production.content == new.model.content:
        return decide(True, "every gate passed, and production is this model")
    given = {"base_proof": production.base_proof, "proof": production.proof, "comparison": production.comparison}
    try:
        old = evidence(store, production.artifact, given=given)
    except GateError as exc:
        why = "; ".join(map(str, exc.problems))
        return decide(False, f"can't be compared with production, which is not whole: {why}")
    verdict = compare_with_production(new, old)
    text = f"every gate passed, and it is better: {verdict.reason}" if verdict.is_better else verdict.reason
    return decide(verdict.is_better, text, verdict.figures)


def promote(
    store: Store,
    artifact: str,
    alias: Alias,
    *,
    model: str,
    given: Mapping[str, str] | None = None,
    run: str | None = None,
    because: str | None = None,
    agreed: str | None = None,
    by_itself: bool = False,
    fresh: bool = False,
) -> Decision:
    """Move an alias to a model, if every gate passed and it is better than the one in production.

    Args:
        store: The store.
        artifact: `export/key` of the model.
        alias: The alias.
        model: Name that the registry knows the model by.
        given: Proofs and comparison, as for `evidence`.
        run: Name of the run that asks for it.
        because: A person's reason to promote although it is not better, or can't be compared. Gates stand.
        agreed: Who agreed, in words.
        by_itself: As for `judge`.
        fresh: Read every file of the model and of what speaks for it.

    Raises:
        GateError: A gate did not pass, or its artifact is missing or damaged.
    """
    registry = Registry(store, model)
    new = evidence(store, artifact, given=given, fresh=fresh)
    with registry.locked():
        decision = judge(store, registry, alias, new, by_itself=by_itself)
        there = _release(registry, alias)
        is_there = there is not None and there.content == new.model.content
        if is_there and there and not release_problems(store, registry.release_folder(there.id)):
            return decision  # with another card it would be a release of its own, and a rollback lead to the same model
        if not decision.promoted and because is None:
            return decision
        text = card(store, new, model)
        release = Release(
            model, artifact, new.model.content, named(new.base_proof), named(new.proof), named(new.comparison),
            card_digest(text),
        )  # fmt: skip
        make_release(store, registry.release_folder(release.id), release, text)
        reason = decision.reason if decision.promoted else f"{because} ({decision.reason})"
        reason = f"{reason}; {agreed}" if agreed else reason
        if registry.points_to(alias) != release.id:
            registry.move(alias, "promoted", release, reason=reason, run=run)
    return Decision(True, reason, alias, model, artifact, decision.before, decision.figures)


def rollback(store: Store, registry: Registry, alias: Alias, *, reason: str) -> tuple[Release, str]:
    """Point an alias at what it pointed to before.

    Returns:
        What it points to now, and `export/key` of what it pointed to.

    Raises:
        GateError: There is nothing before, or it is damaged or gone; the alias stays.
    """
    with registry.locked():
        stack = registry.stack(alias)
        present = registry.points_to(alias)
        former = [name for name in stack if name != present]
        if present is None or not former:
            found = "nothing was promoted" if present is None else "only the present one"
            raise GateError(
                f"{alias} of {registry.model} can't be rolled back", [Problem(alias, "a former model", found)]
            )
        folder = registry.release_folder(former[-1])
        problems = release_problems(store, folder, fresh=True)
        if problems:
            raise GateError(f"{alias} of {registry.model} stays: the former model is not whole", problems)
        after = Release.read(folder)
        before = next(line.artifact for line in reversed(registry.history()) if line.after == present)
        registry.move(alias, "rolled back", after, reason=reason)
    return after, before


def _release(registry: Registry, alias: Alias) -> Release | None:
    """What an alias points to; None if to nothing that can be read."""
    try:
        return registry.release(alias)
    except ValueError:
        return None
