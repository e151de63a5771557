"""Quantised Hugging Face weights by transformers' own functions: what the conversion's table look-ups are held against.

transformers cuts a weight into equal blocks, so one whose edges are not whole blocks is filled up with zeros first.
Without that it would stop, or take a wrong block size where the rows happen to divide by the number of scales.

Shapes: R rows, C columns, K and G rows and columns of the grid of scales, B bytes of a block, E experts.
Source: transformers 5.19 `integrations/finegrained_fp8.py`, `Fp8Dequantize`; `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from mcore.bridge.hf_headers import StoredTensor, read_headers
from mcore.bridge.hf_quantised import FP8_DTYPE, Quantisation


def fp8_weight(weight_RC: Tensor, scales_KG: Tensor, block: tuple[int, int]) -> Tensor:
    """A block-scaled FP8 weight, `[R, C]`, bfloat16."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    num_rows, num_columns = weight_RC.shape
    scales_KG = scales_KG.reshape(-(-num_rows // block[0]), -(-num_columns // block[1]))
    padded = torch.zeros(*(num * size for num, size in zip(scales_KG.shape, block, strict=True)), dtype=torch.uint8)
    padded[:num_rows, :num_columns] = weight_RC.view(torch.uint8)
    dequantize: Any = Fp8Dequantize
    whole = dequantize(hf_quantizer=None).convert(
        {"weight$": padded.view(weight_RC.dtype), "weight_scale_inv": scales_KG.float()}
    )["weight"]
    return cast(Tensor, whole)[:num_rows, :num_columns].to(torch.bfloat16).contiguous()


def mxfp4_weight(blocks_ERGB: Tensor, scales_ERG: Tensor) -> Tensor:
    """MXFP4 weights of experts as a bfloat16 file holds them, `[E, columns, R]`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks_ERGB, scales_ERG)


def load_dequantised(folder: Path, quantisation: Quantisation, **options: Any) -> Any:
    """What `from_pretrained` of the folder's model gives, with these options, for weights dequantised to bfloat16.

    transformers' own loader would dequantise to the dtype of the model, and refuses blocks that are cut at the edges.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    state = dequantised_state(read_headers(folder), quantisation)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(None, config=config, state_dict=state, **options)


def dequantised_state(stored: Mapping[str, StoredTensor], quantisation: Quantisation) -> dict[str, Tensor]:
    """All tensors of a folder, by the names that it would have without quantisation. Holds the whole model."""
    files: set[Path] = {tensor.file for tensor in stored.values()}
    state = {name: tensor for file in sorted(files) for name, tensor in load_file(file).items() if name in stored}
    for name, tensor in stored.items():
        if name.endswith("_blocks") and tensor.dtype == "uint8":
            plain = name.removesuffix("_blocks")
            state[plain] = mxfp4_weight(state.pop(name), state.pop(f"{plain}_scales"))
        elif tensor.dtype == FP8_DTYPE and len(tensor.shape) == 2:
            scales = state.pop(quantisation.scale_name(name))
            state[name] = fp8_weight(state[name], scales, quantisation.block_of(tensor.shape))
            state.pop(quantisation.activation_scale_name(name), None)
    return state
