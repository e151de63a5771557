"""Hugging Face folders of tiny models with quantised weights, by quantisers of our own, and what they stand for.

The reference values are computed number by number, as the formats' descriptions have it: no table, no blocks' padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.hf_folders import weights_of, write_hf_folder
from tests.tiny_mtp import write_mtp_folder

FP8_MAX = 448.0
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def write_fp8_folder(
    folder: Path,
    name: str,
    *,
    block: tuple[int, int] | None = (32, 32),
    scale_dtype: torch.dtype = torch.float32,
    is_static: bool = False,
    max_shard_size: str = "1GB",
    has_further_layers: bool = False,
) -> dict[str, Tensor]:
    """A model whose layers' matrices are FP8 with block scales, as DeepSeek-V3 has them; one scale each if no block.

    Returns:
        What the weights stand for, by the names of an unquantised folder.
    """
    if has_further_layers:
        config = write_mtp_folder(folder, name, dtype=torch.bfloat16)
    else:
        config = write_hf_folder(folder, name, dtype=torch.bfloat16, max_shard_size=max_shard_size)
    scheme = "static" if is_static else "dynamic"
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": scheme, "weight_block_size": block}
    return _rewrite(folder, config | {"quantization_config": quantisation}, block, "_inv", scale_dtype, is_static)


def write_compressed_folder(folder: Path, name: str, *, strategy: str = "channel") -> dict[str, Tensor]:
    """The same as compressed-tensors writes it: a bfloat16 scale for each row, or one for the whole."""
    config = write_hf_folder(folder, name, dtype=torch.bfloat16)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    block = (1, None) if strategy == "channel" else None
    return _rewrite(folder, config | {"quantization_config": quantisation}, block, "", torch.bfloat16, False)


def write_mxfp4_folder(folder: Path, name: str) -> dict[str, Tensor]:
    """A gpt-oss model whose experts' matrices are MXFP4."""
    config = write_hf_folder(folder, name, dtype=torch.bfloat16)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    stored, meant = {}, {}
    for key, tensor in weights_of(folder).items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, values = quantise_mxfp4(tensor.transpose(1, 2).float())
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
            meant[key] = values.transpose(1, 2).contiguous()
        else:
            stored[key] = meant[key] = tensor
    _write(folder, config, stored)
    return meant


def quantise_fp8(tensor: Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 numbers `[R, C]`, scales `[R / block rows, C / block columns]`, and their products as bfloat16."""
    rows, columns = tensor.shape
    numbers, values = torch.empty_like(tensor).to(torch.float8_e4m3fn), torch.empty_like(tensor).bfloat16()
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=scale_dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = tensor[place].abs().max() / FP8_MAX
            numbers[place] = (tensor[place] / scales[i, j].float()).to(torch.float8_e4m3fn)
            values[place] = (numbers[place].float() * scales[i, j].float()).bfloat16()
    return numbers, scales, values


def quantise_mxfp4(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks `[…, C / 32, 16]`, scales `[…, C / 32]`, and what they stand for as bfloat16 `[…, C]`."""
    of_blocks = tensor.unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(of_blocks.abs().amax(-1))) - 2  # 6 is the largest number, 4 its power of two
    scaled = of_blocks / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    values = FP4[codes] * scaled.sign() * torch.exp2(exponents)[..., None]
    nibbles = (codes + 8 * (scaled < 0)).to(torch.uint8)
    blocks = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return blocks, (exponents + 127).to(torch.uint8), values.flatten(-2).bfloat16()


def _rewrite(
    folder: Path,
    config: Mapping[str, Any],
    block: tuple[int, int | None] | None,
    suffix: str,
    scale_dtype: torch.dtype,
    is_static: bool,
) -> dict[str, Tensor]:
    stored, meant = {}, {}
    for key, tensor in weights_of(folder).items():
        if "_proj" in key and key.endswith(".weight") and "eh_proj" not in key:
            rows, columns = tensor.shape
            size = (rows, columns) if block is None else (block[0], block[1] or columns)
            stored[key], scales, meant[key] = quantise_fp8(tensor.float(), size, scale_dtype)
            stored[f"{key}_scale{suffix}"] = scales[0, 0] if block is None else scales
            if is_static:
                stored[f"{key.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
        else:
            stored[key] = meant[key] = tensor
    _write(folder, config, stored)
    return meant


def _write(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """One file a folder had stays one; of several, each tensor goes to the file of its weight."""
    (folder / "config.json").write_text(json.dumps(dict(config)))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        save_file(dict(stored), folder / "model.safetensors", metadata={"format": "pt"})
        return
    before = json.loads(index.read_text())["weight_map"]
    files = sorted(set(before.values()))
    # Scales in another file than their weights, as it happens where a shard is full.
    place = {name: before.get(name, files[number % len(files)]) for number, name in enumerate(sorted(stored))}
    for file in files:
        save_file({name: stored[name] for name in stored if place[name] == file}, folder / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
