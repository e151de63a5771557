import math

import pytest
import torch

from mcore.verify.compare import hidden_error, logit_gap, passes


def logits(seed: int = 0, positions: int = 5, vocab: int = 11) -> torch.Tensor:
    return torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_equal_logits_have_no_gap():
    gap = logit_gap(logits(), logits())
    assert gap.relative_error == gap.max_abs == gap.mean_abs == 0
    assert gap.top1_agreement == 1
    assert gap.min_cosine == pytest.approx(1)


def test_relative_error_is_the_largest_difference_over_the_spread_of_the_hf_side():
    hf = logits()
    mcore = hf.clone()
    mcore[3, 7] += 0.5
    gap = logit_gap(hf, mcore)
    assert gap.max_abs == pytest.approx(0.5, rel=1e-6)
    assert gap.relative_error == pytest.approx(0.5 / hf.double().std().item(), rel=1e-6)
    assert gap.mean_abs == pytest.approx(0.5 / hf.numel(), rel=1e-6)
    assert gap.worst_position == 3


def test_relative_error_does_not_depend_on_the_unit_of_the_logits():
    hf, mcore = logits(0), logits(0) + 1e-3 * logits(1)
    small = logit_gap(hf / 100, mcore / 100)
    assert small.relative_error == pytest.approx(logit_gap(hf, mcore).relative_error, rel=1e-4)
    assert small.mean_abs < logit_gap(hf, mcore).mean_abs / 50


def test_rows_that_pad_the_vocabulary_are_cut_off():
    padded = torch.cat([logits(), torch.full((5, 3), 99.0)], dim=1)
    assert logit_gap(logits(), padded).relative_error == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["hf", "mcore", "both"])
def test_what_is_not_finite_never_passes(value, side):
    hf, mcore = logits(), logits()
    if side != "mcore":
        hf[2, 2] = value
    if side != "hf":
        mcore[2, 2] = value
    assert not passes(logit_gap(hf, mcore).relative_error, 1e9)


def test_constant_logits_never_pass():
    assert not passes(logit_gap(torch.ones(4, 6), torch.ones(4, 6)).relative_error, 1e9)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 11\).*\(4, 11\)"):
        logit_gap(logits(), logits(positions=4))
    with pytest.raises(ValueError, match="shape"):
        logit_gap(logits(vocab=11), logits(vocab=10))


def test_top1_agreement_counts_positions():
    hf = torch.eye(4)
    mcore = torch.eye(4)
    mcore[0] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert logit_gap(hf, mcore).top1_agreement == 0.75


def test_hidden_error_is_measured_at_each_position():
    hf = torch.ones(3, 4)
    hf[0] *= 1000  # a first token as long as real models have it
    mcore = hf.clone()
    mcore[2, 0] += 0.2
    assert hidden_error(hf, mcore) == pytest.approx(0.1, rel=1e-6)


def test_hidden_error_of_zeros_and_of_nan():
    zeros = torch.zeros(2, 3)
    assert hidden_error(zeros, zeros) == 0
    assert hidden_error(zeros, zeros + 1) == math.inf
    wrong = torch.ones(2, 3)
    wrong[1, 1] = math.nan
    assert math.isnan(hidden_error(torch.ones(2, 3), wrong))
