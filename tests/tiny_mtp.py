"""Tiny models with layers for further tokens, which transformers keeps in a model of their own.

Legend: B batch, S sequence, H hidden, V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from tests.hf_folders import weights_of, write_hf_folder
from tests.tiny_models import tiny_hf_model

NUM_MTP_LAYERS = 2
MTP_MODELS = ("deepseek_v3", "glm4_moe")


def tiny_mtp_model(name: str) -> tuple[PreTrainedModel, MtpModel, dict[str, Any]]:
    """A model of `MTP_MODELS`, its layers for further tokens with every tensor perturbed, and its `config.json`."""
    main, config = tiny_hf_model(name)
    main.config.num_mtp_layers = NUM_MTP_LAYERS
    further = MtpModel(main, NUM_MTP_LAYERS).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, tensor in own_tensors(further):
            noise = torch.randn(tensor.shape, generator=generator)
            is_small = parameter_name.endswith("bias")
            scaled = 0.3 * noise if is_small else noise / tensor.shape[-1] ** 0.5
            tensor.copy_(1 + 0.3 * noise if "norm" in parameter_name else scaled)
    return main, further, config | {"num_nextn_predict_layers": NUM_MTP_LAYERS}


def own_tensors(further: MtpModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and router biases of the layers for further tokens, without what they share with the model."""
    named = [*further.named_parameters(), *further.named_buffers()]
    return ((name, tensor) for name, tensor in named if name.startswith("layers."))


def mtp_tensors(main: PreTrainedModel, further: MtpModel) -> dict[str, Tensor]:
    """The layers for further tokens as files of DeepSeek-V3 and GLM-4.5 hold them, copies included."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in own_tensors(further):
        _, number, rest = name.split(".", 2)
        layer = f"model.layers.{main.config.num_hidden_layers + int(number)}."
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if rest == "mlp.experts.gate_up_proj":
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                tensors[f"{layer}mlp.experts.{expert}.gate_proj.weight"] = gate
                tensors[f"{layer}mlp.experts.{expert}.up_proj.weight"] = up
        elif rest == "mlp.experts.down_proj":
            for expert, down in enumerate(tensor):
                tensors[f"{layer}mlp.experts.{expert}.down_proj.weight"] = down
        else:
            tensors[layer + rest] = tensor
        tensors[f"{layer}embed_tokens.weight"] = main.model.embed_tokens.weight
        tensors[f"{layer}shared_head.head.weight"] = main.lm_head.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def reference_logits(main: PreTrainedModel, further: MtpModel, ids_BS: Tensor) -> list[Tensor]:
    """Logits `[B, S, V]` of each depth, by equations 21 to 23 of the DeepSeek-V3 report.

    At depth k, position i joins the hidden state of depth k - 1 and the embedding of token i + k. Behind the end of the
    sequence there are tokens 0.
    """
    length = ids_BS.shape[1]
    positions_BS = torch.arange(length, device=ids_BS.device).expand(len(ids_BS), -1)
    mask = torch.full((length, length), -torch.inf, device=ids_BS.device).triu(1)[None, None]
    hidden_BSH = main.model(ids_BS).last_hidden_state
    rotary = main.model.rotary_emb(hidden_BSH, positions_BS)
    logits = []
    for depth, layer in enumerate(further.layers, 1):
        ahead_BS = torch.nn.functional.pad(ids_BS[:, depth:], (0, depth))
        embedded_BSH = layer.enorm(main.model.embed_tokens(ahead_BS))
        weight_of_embedding, weight_of_hidden = layer.eh_proj.weight.chunk(2, dim=1)
        joint_BSH = embedded_BSH @ weight_of_embedding.T + layer.hnorm(hidden_BSH) @ weight_of_hidden.T
        hidden_BSH = layer.post_norm(layer.mtp_block(joint_BSH, attention_mask=mask, position_embeddings=rotary))
        logits.append(main.lm_head(hidden_BSH))
    return logits


def write_mtp_folder(folder: Path, name: str, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A folder of a model and its layers for further tokens, as their makers publish them. Gives its config.

    The router's bias is fp32 whatever the dtype is, as in DeepSeek-V3's files.
    """
    main, further, config = tiny_mtp_model(name)
    config = write_hf_folder(folder, name, dtype=dtype) | {"num_nextn_predict_layers": NUM_MTP_LAYERS}
    more = {
        key: tensor.to(torch.float32 if key.endswith("correction_bias") else dtype).clone()
        for key, tensor in mtp_tensors(main, further).items()
    }
    save_file(weights_of(folder) | more, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return config
