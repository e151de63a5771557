"""What figures of a fixed suite say about other questions of its kind: intervals and a test, all without a model.

A case stands for questions like it, and another draw of such questions would have given other counts. Intervals say how
much. Base and tuned model answer the same cases, so what counts is the cases on which they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import comb, exp, sqrt
from statistics import NormalDist

NUM_RESAMPLES = 2000
"""Resamples of a bootstrap: enough for the second digit of a 95 % interval's ends."""

Interval = tuple[float, float]


def wilson(num_passed: int, num_cases: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a pass rate.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    z = _z(confidence)
    rate, spread = num_passed / num_cases, z * z / num_cases
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(rate * (1 - rate) / num_cases + spread / (4 * num_cases))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(both: int, gained: int, lost: int, neither: int, confidence: float = 0.95) -> Interval:
    """Interval of the change of a pass rate over the same cases, tuned less base: Newcombe's square-and-add for pairs.

    A bootstrap of such counts would call a change of nothing certain if no case differs; this one doesn't.

    Args:
        both: Cases that both models pass.
        gained: Cases that the tuned model alone passes.
        lost: Cases that the base alone passes.
        neither: Cases that both fail.
        confidence: Share of draws whose interval holds the true change.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998), method 10.
    """
    num_cases = both + gained + lost + neither
    tuned, base = (both + gained) / num_cases, (both + lost) / num_cases
    tuned_low, tuned_high = wilson(both + gained, num_cases, confidence)
    base_low, base_high = wilson(both + lost, num_cases, confidence)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - num_cases / 2, 0)
    alike = product / sqrt(margins) if margins else 0.0

    def distance(one: float, other: float) -> float:
        return sqrt(max(0.0, one * one - 2 * alike * one * other + other * other))

    change = tuned - base
    low = change - distance(tuned - tuned_low, base_high - base)
    high = change + distance(tuned_high - tuned, base - base_low)
    return max(-1.0, low), min(1.0, high)


def probability_of_no_loss(lost: int, gained: int) -> float:
    """McNemar's exact test in one direction: how often as many of the differing cases are lost by chance alone.

    Args:
        lost: Cases that the base alone passes.
        gained: Cases that the tuned model alone passes.

    Returns:
        P(at least `lost` of `lost + gained` fair coins show tails); small if the tuned model is worse.
    """
    differing = lost + gained
    return float(Fraction(sum(comb(differing, number) for number in range(lost, differing + 1)), 2**differing))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests, raised so that the chance of any false alarm among them is the level that is asked.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, value * (len(p_values) - place)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def perplexity_ratio_interval(
    base_losses: Sequence[float],
    tuned_losses: Sequence[float],
    num_tokens: Sequence[int],
    confidence: float = 0.95,
    *,
    seed: int = 0,
) -> Interval:
    """Interval of tuned perplexity divided by base perplexity: a paired bootstrap over the rows.

    Tokens of one row hang together, so that rows are drawn and not tokens.

    Args:
        base_losses: For each row the sum of the base's negative log-probabilities (nats).
        tuned_losses: The same of the tuned model.
        num_tokens: Tokens that each sum is over.
        confidence: Share of draws whose interval holds the true ratio, with many rows; with few it is too narrow.
        seed: Of the draws.
    """
    import numpy as np

    drawn_RN = np.random.default_rng(seed).integers(0, len(num_tokens), (NUM_RESAMPLES, len(num_tokens)))
    more_N = np.asarray(tuned_losses) - np.asarray(base_losses)
    tokens_N = np.asarray(num_tokens)
    ratios_R = more_N[drawn_RN].sum(1) / tokens_N[drawn_RN].sum(1)
    outside = (1 - confidence) / 2
    low, high = np.quantile(ratios_R, (outside, 1 - outside))
    return exp(low), exp(high)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
