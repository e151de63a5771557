"""How far two models' outputs are apart on the same tokens.

Shapes: S positions of one prompt, V vocabulary without padding, P vocabulary with padding, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitGap:
    """Distance of two models' logits over all positions of one prompt.

    `relative_error` is the gate's measure: the largest absolute difference as a fraction of the standard deviation of
    the Hugging Face logits. A logit's unit is arbitrary, so an absolute bound means something else for each model;
    the largest difference, not the mean, because a fault may sit in a single row or position.
    """

    relative_error: float
    max_abs: float
    mean_abs: float
    hf_std: float
    mean_cosine: float
    min_cosine: float
    top1_agreement: float
    worst_position: int


def logit_gap(hf_logits_SV: Tensor, mcore_logits_SP: Tensor) -> LogitGap:
    """Compare logits at every position of one prompt.

    A value that is not finite, on either side, makes `relative_error` NaN or infinite. Constant Hugging Face logits
    make it NaN too: they have no spread to measure by.

    Args:
        hf_logits_SV: `[S, V]`.
        mcore_logits_SP: `[S, P]`; rows that pad the vocabulary are cut off first.
    """
    hf_SV = hf_logits_SV.double()
    mcore_SV = mcore_logits_SP[:, : hf_SV.shape[1]].double()
    if hf_SV.shape != mcore_SV.shape:
        raise ValueError(f"logits of different shape: hf {tuple(hf_SV.shape)}, mcore {tuple(mcore_SV.shape)}")
    difference_SV = (hf_SV - mcore_SV).abs()
    cosine_S = torch.nn.functional.cosine_similarity(hf_SV, mcore_SV, dim=-1)
    hf_std = hf_SV.std().item()
    max_abs = difference_SV.max().item()
    return LogitGap(
        relative_error=max_abs / hf_std if hf_std > 0 else float("nan"),
        max_abs=max_abs,
        mean_abs=difference_SV.mean().item(),
        hf_std=hf_std,
        mean_cosine=cosine_S.mean().item(),
        min_cosine=cosine_S.min().item(),
        top1_agreement=(hf_SV.argmax(-1) == mcore_SV.argmax(-1)).double().mean().item(),
        worst_position=int(difference_SV.amax(-1).argmax()),
    )


def hidden_error(hf_SH: Tensor, mcore_SH: Tensor) -> float:
    """Distance of two hidden states: the norm of the difference over the norm of the Hugging Face vector, at the worst
    position.

    Measured by position, since real models give their first token a vector a thousand times longer than the others;
    a common scale would hide an error everywhere else, or see one in that token's rounding.

    Args:
        hf_SH: `[S, H]`.
        mcore_SH: `[S, H]`.
    """
    hf_SH, mcore_SH = hf_SH.double(), mcore_SH.double()
    difference_S = (hf_SH - mcore_SH).norm(dim=-1)
    norm_S = hf_SH.norm(dim=-1)
    # A vector of zeros on both sides is no error; 0/0 would say NaN.
    error_S = torch.where(difference_S == 0, difference_S, difference_S / norm_S)
    return error_S.max().item()


def passes(error: float, bound: float) -> bool:
    """Whether an error is within its bound. NaN is not."""
    return error <= bound
