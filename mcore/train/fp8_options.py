"""What FP8 asks of a model and of the machine, and what megatron-core is told of it. No torch here.

Source: Transformer Engine 2.20 `utils.assert_dim_for_fp8_exec`, `quantization._compute_fp8_support`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.rules import DECODER
from mcore.errors import Problem
from mcore.train.parameters import COLUMNS_DIVIDED
from mcore.train.tuners.targets import ROUTER, WEIGHT

MULTIPLE = 16
WHOLE = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")
"""Ends of the names of matrices that every tensor parallel process has whole."""
CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
"""Compute capability that a recipe needs at least."""


def fp8_arguments(config: TrainConfig) -> dict[str, Any]:
    """Arguments of megatron-core's `TransformerConfig`; none of a run without FP8."""
    if config.fp8_format is None:
        return {}
    names = ("fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo")
    return {"fp8": config.fp8_format} | {name: getattr(config, name) for name in names}


def fp8_problems(
    config: TrainConfig, hf_config: Mapping[str, Any], *, backend: str, capability: tuple[int, int] | None
) -> list[Problem]:
    """Everything that keeps a run from multiplying in FP8.

    Args:
        config: The run's `train` group.
        hf_config: Mapping of the model's `config.json`.
        backend: Which layers are built.
        capability: Of this process' GPU; None without one.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    if config.fp8_format is None:
        return []
    problems, leave_out = [], "Or leave train.fp8_format out."
    if backend != "transformer_engine":
        problems.append(Problem("train.fp8_format", "backend transformer_engine", f"backend {backend}", leave_out))
    least = CAPABILITY[config.fp8_recipe]
    if capability is not None and capability < least:
        found = ".".join(map(str, capability))
        text = f"a GPU of compute capability {least[0]}.{least[1]} or higher for fp8_recipe: {config.fp8_recipe}"
        problems.append(Problem("train.fp8_format", text, found, leave_out))
    if config.fp8_recipe == "delayed" and any(dims_of(hf_config).moe_layers):
        text = "tensorwise or blockwise, as Transformer Engine takes no stored scales of grouped experts again"
        problems.append(Problem("train.fp8_recipe", text, "delayed"))
    layout = Layout.of(config)
    problems += [
        Problem(f"train.fp8_format: {name}", f"rows and columns by multiples of {MULTIPLE}", f"{rows} x {columns}")
        for name, rows, columns in _matrices(hf_config, layout)
        if rows % MULTIPLE or columns % MULTIPLE
    ]
    return problems


def _matrices(hf_config: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, float, float]]:
    """Each matrix of the decoder's layers that is multiplied in FP8, and its size on one process."""
    family, dims = family_of_config(hf_config), dims_of(hf_config)
    for rule in family.rules:
        is_layer = rule.mcore.startswith(DECODER) and any(rule.applies(dims, layer) for layer in range(dims.num_layers))
        shape = rule.mcore_shape(dims) if is_layer else ()
        if len(shape) != 2 or not rule.mcore.endswith(WEIGHT) or rule.mcore.endswith(ROUTER + WEIGHT):
            continue
        rows, columns = shape
        size = layout.expert_tensor_size if rule.per_expert else layout.tensor_model_parallel_size
        name = rule.mcore.removeprefix(DECODER)
        if rule.mcore.endswith(COLUMNS_DIVIDED):
            yield name, rows, columns / size
        else:
            yield name, rows if rule.mcore.endswith(WHOLE) else rows / size, columns
