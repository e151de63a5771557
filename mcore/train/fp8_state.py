"""Scales of FP8 in a run's checkpoints, as plain tensors.

With `fp8_recipe: delayed` every linear layer of Transformer Engine scales by the largest numbers of earlier steps,
which a resumed run must have too. Transformer Engine hands them out pickled, as a layer's `_extra_state`, and takes no
pickles again unless an environment variable lets it run whatever is in them. Here they are the tensors themselves,
under the same keys. Other recipes have none, nor has a converted base: its layers begin with scales of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import get_fp8_recipe
from torch import Tensor

EXTRA_STATE = "_extra_state"
SCALES = {"fwd": "scaling_fwd", "bwd": "scaling_bwd"}
"""Where a layer has its scales, by the end of their names in a checkpoint."""


@contextmanager
def nothing_pickled(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Have layers hand out no state while checkpoints are described.

    megatron-core takes that of grouped experts apart in any recipe, also where there is nothing in it, and fails (read
    in 0.16.1 with Transformer Engine 2.20).
    """
    layers = [layer for module in modules for _, layer in _layers(module)]
    before = [(layer.fp8, layer.fp8_calibration, layer.fp8_meta["fp8_checkpoint"]) for layer in layers]
    for layer in layers:
        layer.fp8 = layer.fp8_calibration = layer.fp8_meta["fp8_checkpoint"] = False
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.fp8, layer.fp8_calibration, layer.fp8_meta["fp8_checkpoint"] = values


def add_scales(state: Mapping[str, Any], module: torch.nn.Module) -> None:
    """Put a model's scales, as far as it has any, into what is to be saved of it.

    Args:
        state: From the model's `sharded_state_dict`, made under `nothing_pickled`.
        module: The bare model.
    """
    for name, layer in _layers(module):
        entry = state.get(f"{name}.{EXTRA_STATE}")
        if isinstance(entry, ShardedObject) and (scales := _scales(layer)):
            entry.data = scales


def take_scales(state: Mapping[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """Give the layers of a model the scales of a checkpoint.

    Args:
        state: What was loaded, by the keys of the model's `sharded_state_dict`.
        module: The bare model.

    Returns:
        `state` without scales, as the model's `load_state_dict` takes it.
    """
    rest = dict(state)
    for name, layer in _layers(module):
        scales = rest.get(f"{name}.{EXTRA_STATE}")
        if not isinstance(scales, Mapping):
            continue
        recipe = get_fp8_recipe(layer.config)
        layer.fp8_meta["recipe"] = recipe
        layer.fp8_meta["num_gemms"] = scales["num_gemms"]
        layer.init_fp8_meta_tensors(recipe)
        with torch.no_grad():
            for end, key in SCALES.items():
                layer.fp8_meta[key].scale.copy_(scales[f"scale_{end}"])
                layer.fp8_meta[key].amax_history.copy_(scales[f"amax_history_{end}"])
        rest[f"{name}.{EXTRA_STATE}"] = torch.empty(0, dtype=torch.uint8)
    return rest


def _layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's layers of a model, by name."""
    for name, layer in module.named_modules():
        if hasattr(layer, "fp8_meta"):
            yield name, layer


def _scales(layer: Any) -> dict[str, Tensor | int]:
    """Copies of a layer's scales on the CPU; nothing if its recipe has none, or it has not run yet."""
    found: dict[str, Tensor | int] = {}
    for end, key in SCALES.items():
        holder = layer.fp8_meta.get(key)
        if not hasattr(holder, "amax_history"):
            return {}
        found[f"scale_{end}"] = holder.scale.detach().to("cpu", copy=True)
        found[f"amax_history_{end}"] = holder.amax_history.detach().to("cpu", copy=True)
    return found | {"num_gemms": layer.fp8_meta["num_gemms"]}
