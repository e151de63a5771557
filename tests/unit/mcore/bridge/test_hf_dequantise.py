"""Table look-ups against transformers' functions and against the formats' descriptions, bit by bit."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mcore.bridge.hf_dequantise import dequantise_fp8, dequantise_mxfp4
from mcore.verify.dequantise import fp8_weight
from tests.quantised_folders import quantise_fp8, quantise_mxfp4


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def every_fp8_number(rows, columns):
    return torch.arange(rows * columns).remainder(256).to(torch.uint8).view(rows, columns)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_every_fp8_number_at_many_scales_as_transformers_has_it(scale_dtype):
    codes = every_fp8_number(256, 512)
    scales = torch.exp2(torch.linspace(-140, 120, 16)).view(4, 4).to(scale_dtype)  # down to where bfloat16 has no bits
    weight = {"weight$": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales.float()}
    expected = Fp8Dequantize(None).convert(weight)["weight"].bfloat16()
    found = dequantise_fp8(codes, scales, (64, 128), range(256))
    assert torch.equal(bits(found), bits(expected))
    assert found.isnan().sum() == 2 * 512 and len(found.float().unique()) > 1000


@pytest.mark.parametrize("block", [(32, 32), (40, 24), (1, 200), (100, 200), (128, 128)])
def test_any_rows_of_a_weight_with_cut_blocks(block):
    weight = torch.randn(100, 200, generator=torch.Generator().manual_seed(0))
    numbers, scales, values = quantise_fp8(weight, block, torch.float32)
    assert torch.equal(fp8_weight(numbers, scales, block), values)
    codes = numbers.view(torch.uint8)
    for rows in (range(100), range(17, 93), range(41, 43), range(3, 100, 2), range(99, 100)):
        of_rows = scales[rows[0] // block[0] : rows[-1] // block[0] + 1]
        found = dequantise_fp8(codes[rows.start : rows.stop : rows.step], of_rows, block, rows)
        assert torch.equal(bits(found), bits(values[rows.start : rows.stop : rows.step]))


def test_every_mxfp4_byte_at_every_scale_as_transformers_has_it():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = convert_moe_packed_tensors(codes.view(1, 256, 16, 16), scales[None])[0].T
    found = dequantise_mxfp4(codes, scales)
    assert torch.equal(bits(found[:255]), bits(expected[:255]))
    assert found[255].isnan().all()  # the scale that stands for no number


def test_the_test_quantisers_are_near_what_they_quantise():
    weight = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))
    blocks, scales, values = quantise_mxfp4(weight)
    assert torch.equal(dequantise_mxfp4(blocks.view(256, -1), scales.view(256, -1)), values.view(256, -1))
    assert (values - weight).abs().mean() < 0.15
    _, _, close = quantise_fp8(weight[0], (32, 32), torch.float32)
    assert ((close - weight[0]).abs() <= weight[0].abs() / 15 + 0.01).all()
