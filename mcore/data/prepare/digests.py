"""Rows known by 16 bytes of their content: which are alike, and which are on two sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from mcore.data.rows import Row

ASKED_FILE = "asked.npy"
"""Of a prepared folder: digests of what users say in training rows, `[turns, 2]`, uint64, each once. It tells of any
text whether it is trained on."""

_BYTES = 16


def row_content(row: Row) -> str:
    """All that makes two rows equal, as text. Where they come from is no part of it."""
    turns = [
        (turn.role, turn.content, turn.reasoning_content, turn.tool_calls, turn.loss, turn.loss_scale)
        for turn in (*row.messages, *row.rejected)
    ]
    return repr((turns, len(row.messages), row.text, row.tools, row.label, row.chat_template_kwargs))


def turns_asked(row: Row) -> list[str]:
    """What users say in a row, in the form in which `asked_alike` compares it; of `pt`, the whole text."""
    if row.text:
        return [asked_alike(row.text)]
    return [asked_alike(turn.content) for turn in row.messages if turn.role == "user"]


def asked_alike(text: str) -> str:
    """A text without what makes no other question of it: case, and white space."""
    return " ".join(text.casefold().split())


def digests_of(texts: Iterable[str | None]) -> np.ndarray:
    """Digest of each text, `[texts, 2]`, uint64; zeros for None."""
    data = b"".join(
        bytes(_BYTES)
        if text is None
        else hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_BYTES).digest()
        for text in texts
    )
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def firsts(digests: np.ndarray) -> np.ndarray:
    """For each of some digests, the place of the first that is equal to it, `[digests]`, int64."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones, the first stays in front
    ordered = digests[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    found = np.empty(len(order), np.int64)
    found[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]] if len(order) else order
    return found


def among(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each of some digests is among the others, `[digests]`, bool."""
    return firsts(np.concatenate([others, digests]))[len(others) :] < len(others)
