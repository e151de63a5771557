"""Head of sequence classifiers and reward models, in megatron-core's place for the vocabulary head.

B batch, S sequence, H hidden, L labels
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore.errors import ConfigError, Problem


class ClassificationHead(torch.nn.Module):
    """Logits of a few labels at every position. Small, so each tensor parallel rank holds all of it.

    The call is that of megatron's output layer.
    """

    def __init__(self, config: TransformerConfig, num_labels: int) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        device = torch.cuda.current_device()
        shape = (num_labels, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))

    def forward(
        self, hidden_SBH: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Logits `[S, B, L]` of the whole sequence, the same on every tensor parallel rank; and no bias."""
        assert weight is None, "a classifier's head shares no weight"
        if self.sequence_parallel:
            # All ranks go on to compute the same, so their gradients are not to be summed.
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
        return F.linear(hidden_SBH, self.weight), None


def install_classification_head(model: GPTModel, num_labels: int) -> None:
    """Give a model such a head; its `forward` without labels then gives logits `[B, S, L]`.

    To be called on the last pipeline stage, before weights are loaded.
    """
    model.output_layer = ClassificationHead(model.config, num_labels)
    model.compute_language_model_loss = _refuse_language_model_loss


def last_token_logits(logits_BSL: Tensor, ids_BS: Tensor, pad_token_id: int | None) -> Tensor:
    """A classifier's answer, `[B, L]`: its logits at each row's last token that is no padding.

    Source: transformers 5.19, `GenericForSequenceClassification.forward`; a row of nothing but padding gives the
    logits of its first token there, and here.
    """
    if pad_token_id is None:
        return logits_BSL[:, -1]
    positions_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    last_B = (positions_S * (ids_BS != pad_token_id)).argmax(-1)
    return logits_BSL[torch.arange(ids_BS.shape[0], device=ids_BS.device), last_B]


def _refuse_language_model_loss(*_unused: Any) -> NoReturn:
    raise ConfigError(
        "a sequence classifier has no language model loss",
        [Problem("config.json: architectures", "a ...ForCausalLM model, to be trained on tokens", "a classifier")],
    )
