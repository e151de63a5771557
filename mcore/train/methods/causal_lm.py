"""Next-token prediction, what SFT and PT have in common: they differ in which tokens are trained.

Shape suffixes: B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mcore.train.batches import MicroBatch

LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, partial[LossOutput]]:
    """What `get_forward_backward_func` calls for each micro-batch: the stage's output, and the loss to make of it.

    The last pipeline stage returns the loss of each token, `[B, S]`; others return hidden states.
    """
    batch = next(batches)
    output = model(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
    return output, partial(summed_loss, batch.loss_mask_BS)


def summed_loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> LossOutput:
    """Sum of the trained tokens' losses, their number, and the sum again for the record.

    megatron-core adds up numbers over all micro-batches and ranks and divides the gradients by their total
    (`calculate_per_token_loss`), so the loss is a mean over all trained tokens of the step, however it is divided.
    """
    loss = (losses_BS.float() * loss_mask_BS).sum()
    return loss, loss_mask_BS.sum().int(), {"loss_sum": loss.detach()}
