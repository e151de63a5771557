import math

import torch

from mcore.verify.noise import relative_noise
from mcore.verify.report import NoiseResult


def test_noise_is_the_difference_in_standard_deviations():
    generator = torch.Generator().manual_seed(0)
    reference = [3 * torch.randn(40, 50, generator=generator) + 7 for _ in range(3)]
    noise = [logits + 0.3 * torch.randn(40, 50, generator=generator) for logits in reference]
    assert 0.08 < relative_noise(reference, noise) < 0.1  # a quarter of the positions has less than the mean
    noise[1][:20] += 5  # tokens that went to other experts
    assert 0.08 < relative_noise(reference, noise) < 0.1
    padded = [torch.cat([logits, torch.full((40, 6), -1e38)], dim=1) for logits in reference]
    assert relative_noise(reference, padded) == 0


def test_what_is_no_number_never_passes():
    constant = [torch.ones(4, 5)]
    assert math.isnan(relative_noise(constant, constant))
    wrong = torch.ones(4, 5)
    wrong[2, 3] = torch.nan
    assert math.isnan(relative_noise([torch.randn(4, 5)], [wrong]))
    for hf_noise, mcore_noise in ((0.0, 0.0), (math.nan, 1.0), (1.0, math.nan)):
        result = NoiseResult(
            dtype="bfloat16", hf_noise=hf_noise, mcore_noise=mcore_noise, max_noise_ratio=1.25, seconds=0
        )
        assert not result.passed


def test_the_bound_is_a_ratio():
    of = {"dtype": "bfloat16", "hf_noise": 0.02, "max_noise_ratio": 1.25, "seconds": 0}
    assert NoiseResult(mcore_noise=0.0249, **of).passed
    assert not NoiseResult(mcore_noise=0.0251, **of).passed
