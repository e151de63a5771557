"""Whether a model is better than the one in production: both answered the same questions, so case by case.

More cases won than lost is better; as many, and a lower perplexity on the held-out rows is. Models that were not asked
the same in the same way can't be compared, and then nobody can say that one is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcore.registry.gates import Evidence

ENGINE = ("dtype", "device")
"""Figures of an evaluation that answers depend on beside what was asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether it is better, why, and the figures that say so."""

    is_better: bool
    reason: str
    figures: Mapping[str, Any]


def compare_with_production(new: Evidence, old: Evidence) -> Verdict:
    """Compare a model with the one in production, by the cases that both answered.

    Args:
        new: The model that would be promoted.
        old: The one in production.
    """
    unlike = _unlike(new, old)
    if unlike:
        return Verdict(False, f"can't be compared with production ({old.artifact}): {'; '.join(unlike)}", {})
    answers = {(case.group, case.case): case.tuned_passed for case in old.figures.cases}
    pairs = [(case.tuned_passed, answers[case.group, case.case]) for case in new.figures.cases]
    won, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    perplexities = new.figures.tuned.perplexity, old.figures.tuned.perplexity
    figures: dict[str, Any] = {
        "cases": len(pairs),
        "won": won,
        "lost": lost,
        "pass_rate": new.figures.tuned.pass_rate,
        "pass_rate_of_production": old.figures.tuned.pass_rate,
        "perplexity": perplexities[0],
        "perplexity_of_production": perplexities[1],
    }
    text = f"{won} of {len(pairs)} cases won and {lost} lost against production ({old.artifact})"
    if won != lost:
        return Verdict(won > lost, text if won > lost else f"not better: {text}", figures)
    if perplexities[0] is None or perplexities[1] is None:
        return Verdict(False, f"not better: {text}; no perplexity to decide it", figures)
    lower = perplexities[0] < perplexities[1]
    text = f"{text}; perplexity {perplexities[0]:.6g} against {perplexities[1]:.6g}"
    return Verdict(lower, text if lower else f"not better: {text}", figures)


def _unlike(new: Evidence, old: Evidence) -> list[str]:
    """What was not the same for both evaluations: questions, rows, settings of the engine."""
    asked = [evidence.evaluation.ingredients.get("config", {}) for evidence in (new, old)]
    found = [
        f"{name} is another" for name in sorted({*asked[0], *asked[1]}) if asked[0].get(name) != asked[1].get(name)
    ]
    for name in ENGINE:
        values = [getattr(evidence.figures.tuned, name) for evidence in (new, old)]
        if values[0] != values[1]:
            found.append(f"{name} {values[0]} and {values[1]}")
    questions = [[(c.group, c.case, c.prompt, c.expectation) for c in e.figures.cases] for e in (new, old)]
    if not found and questions[0] != questions[1]:
        found.append("other cases")
    return found
