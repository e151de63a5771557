"""The text of a run file: groups and fields in the run model's order, and a comment where something changed meaning."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from configs.schema.run import RunConfig
from flows.from_swift import table
from flows.from_swift.translate import Translation, as_tree

WIDTH = 110


def run_file(translation: Translation) -> str:
    """The YAML text."""
    lines = [f"# Made of a Megatron-SWIFT command by `mcore-flows from-swift` (defaults: release {table.RELEASE})."]
    tree = as_tree(translation.values)
    for group in RunConfig.model_fields:
        content = tree.get(group)
        if isinstance(content, Mapping):
            lines.append(f"{group}:")
            for name in (name for name in table.field_names(group) if name in content):
                lines += _comment(translation.comments.get(f"{group}.{name}", ""))
                lines.append(f"  {name}: {_inline(content[name])}")
        elif content is not None:
            lines.append(f"{group}: {_inline(content)}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"  # {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]


def _inline(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # in quotes, on one line
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")
