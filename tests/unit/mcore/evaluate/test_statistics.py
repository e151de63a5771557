"""Intervals hold what they say, found by counting all outcomes; the test is the sum that it claims to be."""

from itertools import product
from math import comb, exp

import numpy as np
import pytest

from mcore.evaluate.statistics import (
    holm,
    paired_difference,
    perplexity_ratio_interval,
    probability_of_no_loss,
    wilson,
)


def multinomial(counts, rates):
    left, probability = sum(counts), 1.0
    for count, rate in zip(counts, rates, strict=True):
        probability, left = probability * comb(left, count) * rate**count, left - count
    return probability


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_wilson_holds_the_rate_about_as_often_as_it_says(rate):
    num = 40
    held = sum(
        comb(num, k) * rate**k * (1 - rate) ** (num - k)
        for k in range(num + 1)
        if wilson(k, num)[0] <= rate <= wilson(k, num)[1]
    )
    assert 0.92 < held <= 0.99


def test_wilson_at_the_ends_is_not_certain():
    assert wilson(0, 20)[0] == 0.0
    assert 0.1 < wilson(0, 20)[1] < 0.2
    assert wilson(20, 20) == pytest.approx((1 - wilson(0, 20)[1], 1.0))


@pytest.mark.parametrize("rates", [(0.6, 0.1, 0.1, 0.2), (0.75, 0.05, 0.12, 0.08), (0.3, 0.3, 0.1, 0.3)])
def test_the_paired_interval_holds_the_change_about_as_often_as_it_says(rates):
    num, held = 24, 0.0
    for both, gained, lost in product(range(num + 1), repeat=3):
        neither = num - both - gained - lost
        if neither < 0:
            continue
        low, high = paired_difference(both, gained, lost, neither)
        if low <= rates[1] - rates[2] <= high:
            held += multinomial((both, gained, lost, neither), rates)
    assert 0.93 < held < 0.995


def test_the_paired_interval_is_narrower_than_one_of_models_that_answer_independently():
    low, high = paired_difference(50, 4, 6, 40)
    alone_low, alone_high = paired_difference(30, 24, 26, 20)  # the same pass rates, 54 and 56 of 100
    assert low < -0.02 < high
    assert high - low < 0.6 * (alone_high - alone_low)
    low, high = paired_difference(20, 0, 0, 0)
    assert -0.2 < low < 0 < high < 0.2, "twenty cases without a difference prove little"


def test_mcnemar_is_the_tail_of_a_fair_coin():
    assert probability_of_no_loss(0, 0) == 1.0
    assert probability_of_no_loss(5, 0) == 1 / 32
    assert probability_of_no_loss(4, 1) == 6 / 32
    assert probability_of_no_loss(0, 5) == 1.0


def test_holm_raises_the_values_and_keeps_their_order():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.5}) == {"a": 0.08, "b": 0.03, "c": 0.5}
    assert holm({"a": 0.03, "b": 0.02}) == {"a": 0.04, "b": 0.04}
    assert holm({}) == {}


def test_the_ratio_interval_holds_the_true_ratio_and_is_seeded():
    random, held = np.random.default_rng(1), 0
    for _ in range(100):
        tokens = random.integers(5, 60, 50)
        base = random.normal(3, 1, 50) * tokens
        tuned = base + random.normal(0.1, 0.3, 50) * tokens
        low, high = perplexity_ratio_interval(base, tuned, tokens)
        held += low <= exp(0.1) <= high
    assert 86 <= held <= 99
    assert (low, high) == perplexity_ratio_interval(base, tuned, tokens)
    assert (low, high) != perplexity_ratio_interval(base, tuned, tokens, seed=1)
