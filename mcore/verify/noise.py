"""T2: in the dtype of a run, megatron-core is no further from the fp32 logits than transformers is in that dtype.

Rounding to bf16 moves the logits of either model, each in its own way, so they can't be compared with each other as in
T1. What can be compared is how far each is from the transformers model in fp32: a norm that computes in the wrong
dtype, a router that rounds its scores, or weights that were rounded once more show as more noise than the reference's.

Shapes: S positions of one prompt, V vocabulary without padding, P with padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def relative_noise(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Root mean square of the difference over all prompts, over the standard deviation of the reference.

    Args:
        reference: fp32 logits `[S, V]` of each prompt.
        other: Logits `[S, P]` of each prompt; padding rows are cut off.
    """
    squares = variance = 0.0
    for reference_SV, other_SP in zip(reference, other, strict=True):
        reference_SV = reference_SV.double()
        difference_SV = other_SP[:, : reference_SV.shape[1]].double() - reference_SV
        squares += difference_SV.square().sum().item()
        variance += (reference_SV - reference_SV.mean()).square().sum().item()
    return math.sqrt(squares / variance) if variance > 0 else float("nan")
