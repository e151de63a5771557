"""Every call that the project's own code makes, for tests that forbid some."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "flows", "mcore", "tasks", "benchmarks")


@cache
def trees() -> dict[Path, ast.Module]:
    """Each file of the project, parsed."""
    return {path: ast.parse(path.read_text()) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in the project: where it is, the call, and what is called, as text."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> Any:
    """A keyword's value, if the call has it."""
    found = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return ast.literal_eval(found[0]) if found else None
