"""The subsets of `swift/self-cognition`, which are made of one file: for models that think, answers without a thought.

Source: Megatron-SWIFT 4.6, whose registry of data sets makes them in the same way.
"""

from __future__ import annotations

from typing import Any

REPOSITORY = "swift/self-cognition"
EMPTY_THINK = "<think>\n\n</think>\n\n"
VARIANTS = frozenset({"qwen3", "empty_think"})


def repository_subset(repo: str, subset: str) -> str:
    """The subset that lies in the repository, for one that is made of it."""
    return "" if repo == REPOSITORY and subset in {"default", *VARIANTS} else subset


def vary(data: dict[str, Any], variant: str) -> dict[str, Any]:
    """A row of the file as one of the variant: with an empty thought, and for `qwen3` with the question asking for it.

    Rows that are no such rows stay, and are named when they are checked.
    """
    query, response = data.get("query"), data.get("response")
    if not isinstance(query, str) or not isinstance(response, str):
        return data
    return {**data, "query": f"{query} /no_think" if variant == "qwen3" else query, "response": EMPTY_THINK + response}
