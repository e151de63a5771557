"""T2: in the dtype of a run, megatron-core is no further from the fp32 logits than transformers is in that dtype.

Rounding to bf16 moves the logits of either model, each in its own way, so they can't be compared with each other as in
T1. What can be compared is how far each is from the transformers model in fp32: a norm that computes in the wrong
dtype, a router that rounds its scores, or weights that were rounded once more show as more noise than the reference's.

What counts is the lower quartile over positions: rounding may send a token to other experts than in fp32, on either
side by chance, and such positions differ by far more than rounding does.

Shapes: S positions of one prompt, V vocabulary without padding, P with padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILE = 0.25
"""Share of the positions that are at least as near to the reference."""


def relative_noise(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Root mean square of the difference at a position, over the standard deviation of the reference; of all positions
    of all prompts the lower quartile. NaN if any number is NaN.

    Args:
        reference: fp32 logits `[S, V]` of each prompt.
        other: Logits `[S, P]` of each prompt; padding rows are cut off.
    """
    noise = []
    for reference_SV, other_SP in zip(reference, other, strict=True):
        reference_SV = reference_SV.double()
        difference_SV = other_SP[:, : reference_SV.shape[1]].double() - reference_SV
        noise.append(difference_SV.square().mean(dim=1).sqrt())
    spread = torch.cat([logits.double().flatten() for logits in reference]).std().item()
    noise_S = torch.cat(noise)
    if noise_S.isnan().any() or not spread > 0:
        return float("nan")  # a quantile may not see a NaN
    return noise_S.quantile(QUANTILE).item() / spread
