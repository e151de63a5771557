"""Weights that are no finite numbers: found in passing while they are copied, and then named one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mcore.errors import Problem

ROWS_AT_A_TIME = 4096


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite."""
    # Both extremes are NaN where any number is: one pass at memory's speed, where asking every number takes many.
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def not_finite(tensors: Iterable[tuple[str, Any, int]]) -> list[Problem]:
    """What is to be said of those Hugging Face tensors that hold NaN or infinity.

    Args:
        tensors: Name, something that gives rows for a slice, and the number of rows.
    """
    problems = []
    for name, rows, num_rows in tensors:
        num_nan, num_infinite, first = 0, 0, ""
        for start in range(0, num_rows, ROWS_AT_A_TIME):
            window: Tensor = rows[start : min(start + ROWS_AT_A_TIME, num_rows)]
            if is_finite(window):
                continue
            num_nan += int(window.isnan().sum())
            num_infinite += int(window.isinf().sum())
            if not first:
                row, *rest = (~window.isfinite()).nonzero()[0].tolist()
                first = str([start + row, *rest])
        if first:
            found = f"{num_nan} NaN and {num_infinite} infinities, the first at {first}"
            problems.append(
                Problem(f"hf {name}", "finite numbers", found, "The weights are damaged; fetch them again.")
            )
    return problems
