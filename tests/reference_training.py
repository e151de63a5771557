"""Training as anybody would write it: what the training loop on megatron-core is compared with.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema.run import RunConfig
from mcore.data.dataset import TokenDataset


def train_with_transformers(
    model: PreTrainedModel,
    run: RunConfig,
    data: TokenDataset,
    more_loss: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """The same run by transformers' own loss and torch's own AdamW, the whole batch at once. Returns its losses.

    With a bf16 model the optimizer works on fp32 copies of its weights, which are rounded back after each step.
    `more_loss` is called behind each forward pass, with where there are tokens that another is predicted from `[B, S]`;
    what it gives is learnt as well, but no part of the losses that are returned.
    """
    config = run.train
    assert config.train_iters is not None
    main = {parameter: parameter.detach().float().requires_grad_() for parameter in model.parameters()}
    # Of experts whose weights are one tensor, the biases are one of two axes.
    names = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    biases = {parameter for name, parameter in names if name.endswith("bias")}
    divided: list[list[Tensor]] = [[], []]
    for parameter, copy in main.items():
        divided[0 if copy.dim() > 1 and parameter not in biases else 1].append(copy)
    optimizer = torch.optim.AdamW(
        [
            {"params": divided[0], "weight_decay": config.weight_decay},
            {"params": divided[1], "weight_decay": 0.0},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    losses = []
    for step in range(config.train_iters):
        share = (step - config.lr_warmup_iters) / (config.train_iters - config.lr_warmup_iters)
        decayed = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2
        warm = config.lr * step / max(1, config.lr_warmup_iters)
        for group in optimizer.param_groups:
            group["lr"] = warm if step <= config.lr_warmup_iters else decayed
        samples = data.batch(step * config.global_batch_size, config.global_batch_size)
        length = max(len(sample.token_ids) for sample in samples)
        ids_BS = torch.zeros(len(samples), length, dtype=torch.int64, device=model.device)
        labels_BS = torch.full_like(ids_BS, -100)
        weights_BS = torch.zeros(ids_BS.shape, device=model.device)
        attention_BS = torch.zeros_like(ids_BS)
        for row, sample in enumerate(samples):
            tokens = torch.as_tensor(sample.token_ids).long()
            ids_BS[row, : len(tokens)] = tokens
            labels_BS[row, : len(tokens)] = tokens.where(torch.as_tensor(sample.loss_mask) != 0, -100)
            weights_BS[row, : len(tokens)] = torch.as_tensor(sample.loss_mask, dtype=torch.float32)
            attention_BS[row, : len(tokens)] = 1
        output = model(input_ids=ids_BS, attention_mask=attention_BS, labels=labels_BS)
        loss = output.loss
        if not torch.equal(weights_BS[:, 1:], (labels_BS != -100)[:, 1:].float()):
            loss = weighted_loss(output.logits, labels_BS, weights_BS)
        model.zero_grad()
        predicts_BS = attention_BS.bool() & (attention_BS.cumsum(1) < attention_BS.sum(1, keepdim=True))
        (loss if more_loss is None else loss + more_loss(predicts_BS)).backward()
        for parameter, copy in main.items():
            copy.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(main.values(), config.clip_grad)
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in main.items():
                parameter.copy_(copy)
        losses.append(loss.item())
    return losses


def weighted_loss(logits_BSV: Tensor, labels_BS: Tensor, weights_BS: Tensor) -> Tensor:
    """Sum of weight times loss over the number of tokens with a weight (V: vocabulary)."""
    losses = torch.nn.functional.cross_entropy(
        logits_BSV[:, :-1].float().flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    weights = weights_BS[:, 1:].flatten()
    return (losses * weights).sum() / (weights > 0).sum()
