"""Logits of further tokens, as transformers computes them for its drafts: the reference for a model's MTP layers.

B batch (1), S positions of the prompt, H hidden size, V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mcore.bridge.further_tokens import KEY, config_of_files
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_headers import SINGLE_FILE, read_headers
from mcore.bridge.hf_quantised import quantisation_of
from mcore.verify.dequantise import dequantised_state

ATTRIBUTE = "further_layers"


def attach_further_layers(model: Any, hf: Path) -> None:
    """Load a folder's layers for further tokens, if it has any, and keep them as an attribute of its model.

    They are no part of the model's module tree: what goes over that sees the model as it was.

    Source: transformers 5.19 `modeling_layers.py`, `MtpModel`.
    """
    config = read_hf_config(hf)
    stored = read_headers(hf)
    num_layers = config_of_files(config, stored).get(KEY) or 0
    if not num_layers:
        return
    from transformers.modeling_layers import MtpModel

    first = model.config.num_hidden_layers
    # Its own patterns are for the numbers of layers that the published models have.
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{number}\..*" for number in range(first, first + num_layers)
    ]
    model.config.num_mtp_layers = num_layers
    with TemporaryDirectory() as scratch:
        if (quantisation := quantisation_of(config)) is not None:
            # transformers takes these layers from files only, and does not dequantise them.
            prefixes = tuple(f"model.layers.{number}." for number in range(first, first + num_layers))
            own = {name: tensor for name, tensor in stored.items() if name.startswith(prefixes)}
            save_file(dequantised_state(own, quantisation), Path(scratch) / SINGLE_FILE, metadata={"format": "pt"})
            model.config.name_or_path = scratch
        further: Any = MtpModel.from_pretrained(model)
    object.__setattr__(model, ATTRIBUTE, further.eval())


def hf_further_logits(model: Any, ids_BS: Tensor, hidden_BSH: Tensor) -> list[Tensor]:
    """Logits `[B, S, V]` of each depth; none if the model has no such layers.

    At depth k, position i joins the hidden state of depth k - 1 and the embedding of token i + k. Behind the end of the
    prompt there are tokens 0, as in megatron-core.

    Args:
        model: From `load_hf_model`.
        ids_BS: The prompt.
        hidden_BSH: What the model's final norm put out.
    """
    further = getattr(model, ATTRIBUTE, None)
    if further is None:
        return []
    length = ids_BS.shape[1]
    positions_BS = torch.arange(length, device=ids_BS.device)[None]
    rotary = model.base_model.rotary_emb(hidden_BSH, positions_BS)
    never = torch.finfo(hidden_BSH.dtype).min
    mask_SS = torch.full((length, length), never, dtype=hidden_BSH.dtype, device=ids_BS.device).triu(1)
    logits = []
    for depth, layer in enumerate(further.layers, 1):
        ahead_BS = torch.nn.functional.pad(ids_BS[:, depth:], (0, depth))[:, :length]
        hidden_BSH = layer(
            further.embed_tokens(ahead_BS),
            hidden_BSH,
            position_embeddings=rotary,
            attention_mask=mask_SS[None, None],
            position_ids=positions_BS,
            past_key_values=None,
        )
        logits.append(further.shared_head(hidden_BSH))
    return logits
