"""How a folder's quantised weights are stored, as its `config.json` says. No torch here.

    fp8                  `x.weight` float8_e4m3fn and `x.weight_scale_inv`, one scale a block of `weight_block_size`
                         (DeepSeek-V3, Qwen3-FP8), or one for all of the weight if that is null
    compressed-tensors   `x.weight` float8_e4m3fn and `x.weight_scale`, one a tensor, a row or a block (GLM-4.5-FP8)
    mxfp4                `x_blocks`, two four-bit floats a byte, and `x_scales`, a power of two for 32 of them (gpt-oss)

In each of them a weight is its stored number times its scale. What is left unquantised is told by its dtype, not by the
config's lists of modules.

Source: transformers 5.19 `integrations/finegrained_fp8.py`, `integrations/mxfp4.py`; compressed-tensors 0.17
`quantization/lifecycle/forward_helpers.py`; OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mcore.bridge.dims import Shape
from mcore.errors import ConfigError, Problem

Method = Literal["fp8", "mxfp4", "compressed-tensors"]
METHODS: tuple[Method, ...] = ("fp8", "mxfp4", "compressed-tensors")
FP8_DTYPE = "float8_e4m3fn"
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
"""torch's names of the dtypes that scales of FP8 weights may have."""
DEQUANTISED = "bfloat16"
"""torch's name of the dtype that quantised weights are read as."""
MX_BLOCK_BYTES = 16
"""Bytes of an MXFP4 block, which holds 32 numbers."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What `config.json` says of quantised weights.

    `block` is how many rows and columns of an FP8 weight share a scale; None stands for all of them.
    """

    method: Method
    block: tuple[int | None, int | None] = (None, None)

    def scale_name(self, weight: str) -> str:
        """Name of the scales of an FP8 weight."""
        return f"{weight}_scale" if self.method == "compressed-tensors" else f"{weight}_scale_inv"

    def activation_scale_name(self, weight: str) -> str:
        """Name of the scale that a quantised model's activations may have beside a weight. It is no weight."""
        suffix = "input_scale" if self.method == "compressed-tensors" else "activation_scale"
        return f"{weight.removesuffix('weight')}{suffix}"

    def block_of(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a weight that share a scale."""
        rows, columns = self.block
        return rows or max(1, shape[0]), columns or max(1, shape[1])


def method_of(config: Mapping[str, Any]) -> str | None:
    """The name of a config's quantisation, known or not; None if there is none."""
    found = config.get("quantization_config")
    return str(found.get("quant_method")) if isinstance(found, Mapping) else None


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """The quantisation that a `config.json` names, or None if it names none that is known here.

    A config may still name one although the weights were dequantised since, so an unknown one is no error by itself.

    Raises:
        ConfigError: Its block size can't be understood.
    """
    found = config.get("quantization_config")
    method = method_of(config)
    if method == "mxfp4":
        return Quantisation("mxfp4")
    if method == "fp8":
        block = found.get("weight_block_size", "nothing")  # type: ignore[union-attr]
        return Quantisation("fp8", _block(block, "config.json: quantization_config.weight_block_size"))
    if method == "compressed-tensors":
        return Quantisation("compressed-tensors", _compressed_block(found))  # type: ignore[arg-type]
    return None


def _block(found: Any, place: str) -> tuple[int | None, int | None]:
    if found is None:
        return (None, None)
    if not isinstance(found, list) or len(found) != 2 or not all(type(size) is int and size > 0 for size in found):
        raise ConfigError(
            "the model's quantisation can't be read",
            [Problem(place, "two positive integers, such as [128, 128], or null", repr(found))],
        )
    return (found[0], found[1])


def _compressed_block(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """All groups must quantise weights in the same way: the config says by patterns which layer is in which group."""
    place = "config.json: quantization_config.config_groups"
    groups = config.get("config_groups")
    schemes: list[Any] = (
        [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    wanted = "the same symmetric 8-bit float weights in every group, a scale for each tensor, channel or block"
    if (
        not schemes
        or not all(isinstance(scheme, Mapping) and scheme == schemes[0] for scheme in schemes)
        or (schemes[0].get("type"), schemes[0].get("num_bits")) != ("float", 8)
        or schemes[0].get("symmetric") is False
        or schemes[0].get("strategy") not in ("tensor", "channel", "block")
    ):
        raise ConfigError("the model's quantisation can't be read", [Problem(place, wanted, repr(groups)[:200])])
    strategy = schemes[0]["strategy"]
    if strategy == "block":
        return _block(schemes[0].get("block_structure", "nothing"), f"{place}: block_structure")
    return (None, None) if strategy == "tensor" else (1, None)
