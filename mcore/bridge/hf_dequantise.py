"""Quantised numbers to bfloat16, a few rows at a time, by tables: a weight can only be one of 256 numbers times its
scale, so each block's products are rounded once and then looked up. Same bits as multiplying in fp32 and rounding each.

Shapes: R rows, C columns, K and G rows and columns of the grid of scales, N bytes of a row of packed numbers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What a four-bit float (e2m1) stands for; the fourth bit is the sign. Source: OCP Microscaling Formats (MX) 1.0."""
EXPONENT_BIAS = 127


def dequantise_fp8(codes_RC: Tensor, scales_KG: Tensor, block: tuple[int, int], rows: range) -> Tensor:
    """Some rows of a block-scaled FP8 weight, `[R, C]`, bfloat16.

    Args:
        codes_RC: Bytes of float8_e4m3fn, uint8, the rows `rows` of the weight.
        scales_KG: Scales from that of the first of `rows` on, to that of the last.
        block: Rows and columns that share a scale. Blocks at the edges may be cut.
        rows: Numbers of the rows.
    """
    num_block_columns = scales_KG.shape[1]
    products_KGX = _fp8_numbers() * scales_KG.float()[..., None]
    table = products_KGX.to(torch.bfloat16).view(torch.int16).flatten()
    place_R = (torch.arange(rows.start, rows.stop, rows.step) // block[0] - rows.start // block[0]) * num_block_columns
    place_C = torch.arange(codes_RC.shape[1]) // block[1]
    index_RC = codes_RC.int() + (256 * place_R).int()[:, None] + (256 * place_C).int()
    return table.index_select(0, index_RC.flatten()).view(torch.bfloat16).view(codes_RC.shape)


def dequantise_mxfp4(codes_RN: Tensor, scales_RG: Tensor) -> Tensor:
    """Rows of an MXFP4 weight, `[R, 2 * N]`, bfloat16.

    Args:
        codes_RN: Two numbers a byte, uint8, the one in the low bits first.
        scales_RG: Exponents, uint8, plus 127.
    """
    num_rows, num_bytes = codes_RN.shape
    codes_RGB = codes_RN.view(num_rows, scales_RG.shape[1], -1)
    index_RGB = codes_RGB.int() + (256 * scales_RG.int())[..., None]
    pairs = _fp4_pairs().index_select(0, index_RGB.flatten())
    return pairs.view(torch.bfloat16).view(num_rows, 2 * num_bytes)


@functools.cache
def _fp8_numbers() -> Tensor:
    """The number that each byte of float8_e4m3fn stands for, fp32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@functools.cache
def _fp4_pairs() -> Tensor:
    """Two bfloat16 as one int32, by 256 times the scale plus the byte. A scale of 255 is no number."""
    numbers = torch.tensor([*FP4_NUMBERS, *(-number for number in FP4_NUMBERS)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    pair = torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=-1)
    exponent = torch.arange(256, dtype=torch.int32) - EXPONENT_BIAS
    scaled = torch.ldexp(pair.expand(256, 256, 2), exponent[:, None, None]).to(torch.bfloat16)
    scaled[255] = torch.nan  # transformers reads it as 2^128, which would make large but finite numbers of some
    return scaled.contiguous().view(torch.int32).flatten()
