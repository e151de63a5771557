"""A rank's part of a micro-batch whose samples are divided over ranks (context parallelism).

The division comes last: labels are of the next token of the whole sample, and padding is what all ranks need, so that
what a token is trained to predict does not depend on who has it.

Shape suffixes: B micro-batch, S tokens of the row, T trained tokens of the micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mcore.backend.context import places_of_rank
from mcore.backend.layout import Layout
from mcore.train.batches import MicroBatch


def part_of_batch(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """What one of the ranks that share a micro-batch reads of it.

    Bounds of packed samples stay those of the whole row, as attention and rotary embedding want them. Transformer
    Engine asks for them with padding, too, as soon as ranks share samples; here padding is part of a sample.

    Args:
        batch: The whole micro-batch; its samples divide into `2 * size` chunks.
        size: Ranks that share it.
        rank: One of them.
    """
    if size == 1:
        return batch
    num_samples, length = batch.tokens_BS.shape
    places_S = places_of_rank((length,) if batch.samples is None else batch.samples.lengths, size, rank)
    places_S = places_S.to(batch.tokens_BS.device)
    own_S = torch.full((length,), -1, dtype=torch.int64, device=places_S.device)
    own_S[places_S] = torch.arange(len(places_S), device=places_S.device)
    # Places are sequence-first, and where a trained token's place is here depends on its place in the row alone.
    own_T = own_S[batch.trained_places_T // num_samples]
    is_mine_T = own_T >= 0
    samples = batch.samples
    if samples is not None:
        bounds = {"cu_seqlens_q_padded": samples.cu_seqlens_q, "cu_seqlens_kv_padded": samples.cu_seqlens_kv}
        samples = replace(samples, **bounds)
    return replace(
        batch,
        tokens_BS=batch.tokens_BS[:, places_S],
        position_ids_BS=batch.position_ids_BS[:, places_S],
        padding_BS=batch.padding_BS[:, places_S],
        trained_places_T=(own_T * num_samples + batch.trained_places_T % num_samples)[is_mine_T],
        labels_1T=batch.labels_1T[:, is_mine_T],
        weights_1T=None if batch.weights_1T is None else batch.weights_1T[:, is_mine_T],
        samples=samples,
    )


def length_multiples(layout: Layout, token_multiple: int = 1) -> tuple[int, int]:
    """Tokens that the length of a row, and of a packed sample in it, must be a multiple of each.

    Each rank gets two chunks of every sample, and with sequence parallelism the tensor parallel ranks share its part.

    Args:
        layout: How samples are divided.
        token_multiple: What a rank's part of a row must be a multiple of (`configs.schema.fp8`).
    """
    cp = layout.context_parallel_size
    of_sample = 1 if cp == 1 else 2 * cp
    of_row = cp * (layout.tensor_model_parallel_size if layout.sequence_parallel else 1) * token_multiple
    return math.lcm(of_row, of_sample), of_sample
