"""A row's columns under the names, and with the values, that an adapter gives them."""

from __future__ import annotations

import json
from typing import Any

from configs.schema.adapter import Adapter
from mcore.data.rows import RowError, short


def adapt(data: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The row as the adapter says; what the adapter does not name stays.

    Raises:
        RowError: A column would be there twice, or a value is none that the adapter knows.
    """
    row: dict[str, Any] = {}
    for old, value in data.items():
        name = adapter.columns.get(old, old)
        if name in row or (name != old and name in data and adapter.columns.get(name, name) == name):
            raise RowError("column_twice", name, "one column of this name", f"{old!r}, which the adapter names so, too")
        row[name] = _mapped(name, value, adapter.values[name]) if name in adapter.values else value
    return row


def _mapped(name: str, value: Any, values: dict[str, Any]) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    if text not in values:
        raise RowError("unmapped_value", name, f"one of {', '.join(values)} (the adapter's values)", short(value))
    return values[text]
