"""Losses of routers as their papers have them, of a transformers model: what training that balances is compared with.

Shape suffixes: B batch, S sequence, E experts, G groups of tokens, N tokens of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema.experts import ExpertFields


class RouterLosses:
    """Balancing loss and z-loss of the last forward pass of a softmax model, summed over its layers.

    The balancing loss of a group of N tokens is `E * sum over experts of (share of all choices * mean score)`; groups
    count by their tokens.

    Source: Switch Transformer, arXiv 2101.03961; ST-MoE, arXiv 2202.08906.
    """

    def __init__(self, model: PreTrainedModel, fields: ExpertFields) -> None:
        self.fields, self.topk = fields, model.config.num_experts_per_tok
        self.logits: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, inputs, output: self.logits.append(output[0]))

    def __call__(self, predicts_BS: Tensor) -> Tensor:
        """The losses; tokens that nothing is predicted from do not count."""
        total = torch.zeros(())
        for logits_TE in self.logits:
            logits_BSE = logits_TE.view(*predicts_BS.shape, -1)
            if self.fields.moe_router_load_balancing_type == "aux_loss":
                groups = [logits_BSE[predicts_BS]]
            else:
                groups = [of_sample[predicts] for of_sample, predicts in zip(logits_BSE, predicts_BS, strict=True)]
            num_tokens = int(predicts_BS.sum())
            total = total + sum(self.of_group(logits_NE) * len(logits_NE) for logits_NE in groups) / num_tokens
        self.logits.clear()
        return total

    def of_group(self, logits_NE: Tensor) -> Tensor:
        num_experts = logits_NE.shape[1]
        scores_NE = logits_NE.softmax(-1)
        choices_E = torch.bincount(scores_NE.topk(self.topk).indices.flatten(), minlength=num_experts)
        balance = num_experts * (choices_E / choices_E.sum() * scores_NE.mean(0)).sum()
        z_loss = logits_NE.logsumexp(-1).square().mean()
        return self.fields.moe_aux_loss_coeff * balance + (self.fields.moe_z_loss_coeff or 0.0) * z_loss
