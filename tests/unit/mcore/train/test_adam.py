"""Main weights as a bf16 weight and 16 further bits, as Transformer Engine's Adam keeps them."""

from __future__ import annotations

import torch

from mcore.train.adam import join_main_weight, split_main_weight


def bits(*upper_and_lower: tuple[int, int]) -> torch.Tensor:
    numbers = [upper << 16 | lower for upper, lower in upper_and_lower]
    return torch.tensor([n - 2**32 if n >= 2**31 else n for n in numbers], dtype=torch.int32).view(torch.float32)


def test_every_number_comes_back_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randint(-(2**31), 2**31, (1000, 1000), generator=draw, dtype=torch.int64).to(torch.int32)
    weight = weight.view(torch.float32)
    rounded, remainder = split_main_weight(weight)
    assert rounded.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert rounded.shape == remainder.shape == weight.shape
    assert torch.equal(join_main_weight(rounded, remainder).view(torch.int32), weight.view(torch.int32))


def test_the_bf16_part_is_the_nearest_and_what_torch_rounds_to() -> None:
    weight = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    rounded, remainder = split_main_weight(weight)
    # Of two that are as near, torch takes the even one; Transformer Engine the one further from zero.
    tie = remainder == -(2**15)
    assert torch.equal(rounded[~tie], weight.to(torch.bfloat16)[~tie])


def test_the_halves_are_those_of_transformer_engine() -> None:
    rounded, remainder = split_main_weight(bits((0x3F80, 0x0001), (0x3F80, 0x8000), (0xBF80, 0xFFFF), (0x0000, 0x7FFF)))
    assert rounded.view(torch.int16).tolist() == [0x3F80, 0x3F81, 0xBF81 - 2**16, 0x0000]
    assert remainder.tolist() == [1, -(2**15), -1, 0x7FFF]


def test_a_weight_that_was_never_updated_is_its_bf16_rounding() -> None:
    rounded = torch.randn(100, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(join_main_weight(rounded, torch.zeros(100, dtype=torch.int16)), rounded.float())
