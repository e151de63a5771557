"""Hugging Face folders of tiny models on disk, and what is in them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.plan import steps_of
from tests.tiny_models import tiny_hf_model

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_hf_folder(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> dict[str, Any]:
    """Save a model of `tests.tiny_models.MODELS` as transformers does, with files that travel. Gives its config."""
    model, config = tiny_hf_model(name, dtype=dtype)
    model.config.architectures = config["architectures"]
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return dict(json.loads((folder / "config.json").read_text()))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, read by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def write_zero_model(folder: Path, config: Mapping[str, Any]) -> int:
    """A float32 model of zeros whose file is a hole: large, yet it takes no time to make. Gives its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    dims = dims_of(config)
    header: dict[str, Any] = {}
    end = 0
    for step in steps_of(family_of_config(config), dims):
        for name, shape in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True):
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end
