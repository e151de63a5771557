from __future__ import annotations

import pytest
import torch

from mcore.bridge.finite import is_finite, not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_anywhere_is_seen(dtype, value):
    numbers = torch.randn(3, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(numbers)
    for place in ((0, 0), (1, 17), (2, 36)):
        changed = numbers.clone()
        changed[place] = value
        assert not is_finite(changed)


def test_the_largest_numbers_and_none_at_all_are_finite():
    largest = torch.finfo(torch.bfloat16).max
    assert is_finite(torch.tensor([largest, -largest], dtype=torch.bfloat16).repeat(1000))
    assert is_finite(torch.empty(0, 3))


def test_every_tensor_is_described_whatever_window_it_is_in(monkeypatch):
    monkeypatch.setattr("mcore.bridge.finite.ROWS_AT_A_TIME", 4)
    damaged, sound, vector = torch.zeros(10, 2), torch.zeros(10, 2), torch.zeros(10)
    damaged[5, 1] = damaged[9, 0] = torch.nan
    damaged[7, 0] = torch.inf
    vector[9] = -torch.inf
    found = not_finite([("damaged", damaged, 10), ("sound", sound, 10), ("vector", vector, 10)])
    assert [(problem.subject, problem.found) for problem in found] == [
        ("hf damaged", "2 NaN and 1 infinities, the first at [5, 1]"),
        ("hf vector", "0 NaN and 1 infinities, the first at [9]"),
    ]
