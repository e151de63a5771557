"""The bare transformers loop of `benchmarks.train_cpu`, under torchrun: prints each step's seconds and tokens.

As somebody would write it who cares for speed: SDPA, torch's fused AdamW, samples of a micro-batch padded to their
longest, gradients of DistributedDataParallel exchanged with the last micro-batch of a step only.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from configs.schema.load import load_run
from mcore.data.prepare.build import build_datasets
from mcore.data.template import Sample

MARK = "steps: "


def main() -> None:
    """Train as the run says, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    run = load_run(options.run_file)
    config = run.train
    assert config.train_iters is not None
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    data, _ = build_datasets(run.data, config.method, options.model, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    ).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    replica = DistributedDataParallel(model) if size > 1 else model
    steps = []
    for number in range(config.train_iters):
        start = perf_counter()
        samples = data.batch(number * config.global_batch_size, config.global_batch_size)
        num_trained = sum(sum(sample.loss_mask[1:]) for sample in samples)
        mine = samples[rank::size]
        micro_batches = [mine[i : i + config.micro_batch_size] for i in range(0, len(mine), config.micro_batch_size)]
        for place, chosen in enumerate(micro_batches):
            ids_BS, labels_BS, mask_BS = _padded(chosen)
            last = place == len(micro_batches) - 1
            with replica.no_sync() if size > 1 and not last else nullcontext():
                loss = replica(
                    input_ids=ids_BS,
                    attention_mask=mask_BS,
                    labels=labels_BS,
                    num_items_in_batch=num_trained / size,  # DistributedDataParallel takes the mean over ranks
                    use_cache=False,
                ).loss
                loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        steps.append((perf_counter() - start, sum(len(sample.token_ids) - 1 for sample in samples)))
    if rank == 0:
        sys.stdout.write(f"\n{MARK}{json.dumps(steps)}\n")
    dist.destroy_process_group()


def _padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels (-100 where no token is trained) and attention mask, each `[B, S]`."""
    length = max(len(sample.token_ids) for sample in samples)
    ids_BS = torch.zeros(len(samples), length, dtype=torch.int64)
    labels_BS, mask_BS = torch.full_like(ids_BS, -100), torch.zeros_like(ids_BS)
    for row, sample in enumerate(samples):
        tokens = torch.as_tensor(sample.token_ids, dtype=torch.int64)
        ids_BS[row, : len(tokens)] = tokens
        labels_BS[row, : len(tokens)] = tokens.where(torch.as_tensor(sample.loss_mask), -100)
        mask_BS[row, : len(tokens)] = 1
    return ids_BS, labels_BS, mask_BS


if __name__ == "__main__":
    main()
