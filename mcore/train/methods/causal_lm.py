"""Next-token prediction, what SFT and PT have in common: they differ in which tokens are trained.

Logits are only computed where a token is trained. In SFT that is a part of all tokens (a quarter in the demo), and the
output layer is the widest of all: a fifth of the work in a small model, and the largest activations in any, so that
they are made for a chunk of the tokens at a time (`mcore.backend.cross_entropy`).

Shape suffixes: B micro-batch, S sequence, T trained tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from configs.schema.train import TrainConfig
from mcore.backend.cross_entropy import ChosenTokenLosses
from mcore.train.batches import MicroBatch

LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


def prepare(module: GPTModel, config: TrainConfig) -> None:
    """Have a model, on the pipeline stage with the output layer, give the losses of trained tokens only."""
    ChosenTokenLosses(module, config.cross_entropy_chunk_tokens)


def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """What `get_forward_backward_func` calls for each micro-batch: the stage's output, and the loss to make of it.

    The last pipeline stage returns the losses of the trained tokens, `[1, T]`; others return hidden states.
    """
    batch, config = next(batches), get_model_config(model)
    if get_attr_wrapped_model(model, "post_process"):
        losses = get_attr_wrapped_model(model, "_postprocess")
        losses.places_T, losses.weights_1T = batch.trained_places_T, batch.weights_1T
    options: dict[str, Any] = {} if batch.samples is None else {"packed_seq_params": batch.samples}
    if config.num_moe_experts is not None:
        options["padding_mask"] = batch.padding_BS
        if config.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
            # megatron-core divides it where it divides the embedding, and forgets the stages behind.
            rank, size = parallel_state.get_tensor_model_parallel_rank(), config.tensor_model_parallel_size
            options["padding_mask"] = batch.padding_BS.chunk(size, dim=1)[rank]
    return model(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_1T, **options), summed_loss


def summed_loss(losses_1T: Tensor) -> LossOutput:
    """Sum of the trained tokens' (weighted) losses, their number, and the sum again for the record.

    megatron-core adds up numbers over all micro-batches and ranks and divides the gradients by their total
    (`calculate_per_token_loss`), so the loss is a mean over all trained tokens of the step, however it is divided.
    """
    loss = losses_1T.float().sum()
    # Filled in on the device: a number sent there would be waited for, between the forward and the backward pass.
    num_tokens = torch.full((), losses_1T.numel(), dtype=torch.int, device=losses_1T.device)
    return loss, num_tokens, {"loss_sum": loss.detach()}
