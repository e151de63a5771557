"""Random numbers of a step that follow from the run's seed and the step's number, and from nothing before it.

Data parallel ranks have samples of different lengths, so that their generators drift apart, and a checkpoint keeps one
rank's only. With generators that start anew at every step a resumed run draws what an undisturbed one does.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def seed_step(seed: int, iteration: int) -> None:
    """Seed torch's and megatron-core's generators for a step.

    Tensor parallel ranks of a stage get the same seed, as megatron-core wants it; others each their own.

    Args:
        seed: The run's.
        iteration: The step's number.
    """
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    digest = hashlib.sha256(f"{seed} {iteration} {place}".encode()).digest()
    of_step = int.from_bytes(digest[:4], "big") >> 2
    torch.manual_seed(of_step)
    model_parallel_cuda_manual_seed(of_step, force_reset_rng=True)
