"""What a worker does: a part of a source becomes samples, with a note of what became of each of its rows.

A part has the same rows however many workers there are, and what is made of it depends on nothing else. So the files
that the parts are put together into are the same, too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema.data import DataConfig
from mcore.data.chat.options import options_of
from mcore.data.dataset import Block
from mcore.data.prepare.digests import digests_of, row_content, turns_asked
from mcore.data.prepare.dropped import DroppedRows
from mcore.data.prepare.length import fit_length, too_long
from mcore.data.rows import MAX_LISTED, Dropped, Method, Row, raise_problems
from mcore.data.template import Sample, encode_rows, load_tokenizer
from mcore.errors import DataError, Problem

TEMPLATE = "template"
"""Why a row is dropped that the tokenizer and its chat template make no sample of."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of the rows of a part, in their order.

    Attributes:
        block: The samples that are kept.
        usable: Whether each row made samples, if only such as are too long, `[rows]`, bool.
        counts: Samples of each row that are kept, those of them that were cut, and those that were left out as too
            long, `[rows, 3]`, int32.
        digests: Of each row's content, `[rows, 2]`, uint64; zeros for a row that could not be read.
        asked: Digest of each user turn, `[turns, 2]`, uint64.
        asked_rows: The row of each user turn, `[turns]`, int64.
        dropped: The rows that can't be used.
        problems: What no drop budget covers, `MAX_LISTED` at most.
        num_problems: How many there are.
    """

    block: Block
    usable: np.ndarray
    counts: np.ndarray
    digests: np.ndarray
    asked: np.ndarray
    asked_rows: np.ndarray
    dropped: DroppedRows
    problems: list[Problem]
    num_problems: int


class Encoder:
    """Turns rows into samples. It holds the tokenizer, so that one is made for many parts.

    Args:
        config: The run's `data`.
        method: The run's `train.method`.
        hf_dir: Folder with `config.json`, tokenizer files and chat template of the base model.

    Raises:
        DataError: The folder can't be used with rows of this kind.
    """

    def __init__(self, config: DataConfig, method: Method, hf_dir: Path) -> None:
        self.config, self.method = config, method
        self.vocab_size = read_vocab_size(hf_dir)
        self.tokenizer = load_tokenizer(hf_dir)
        self.options = options_of(config, hf_dir)
        raise_problems("the data can't be used with this model", self._samples([])[1])

    def _samples(self, rows: Sequence[Row]) -> tuple[list[Sample], list[Problem]]:
        return encode_rows(rows, self.tokenizer, self.method, options=self.options)

    def encode(self, rows: Iterable[Row | Dropped]) -> Encoded:
        """What becomes of the rows of a part; no two of them have the same place."""
        found = list(rows)
        good = [(number, row) for number, row in enumerate(found) if isinstance(row, Row)]
        dropped = DroppedRows()
        for row in found:
            if isinstance(row, Dropped):
                dropped.add(row.reason, row.problem)
        samples, refused = self._samples([row for _, row in good])
        problems = self._without_embedding(samples)
        made: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            made[sample.place].append(sample)
        for place, problem in _with_places(refused, [row.place for _, row in good]).items():
            made.pop(place, None)  # of a conversation that is split, all samples or none
            dropped.add(TEMPLATE, problem)
        usable = np.zeros(len(found), bool)
        counts = np.zeros((len(found), 3), np.int32)
        kept: list[Sample] = []
        for number, row in good:
            for sample in made.get(row.place, ()):
                usable[number] = True
                fitting = fit_length(sample, self.config)
                if fitting is not None:
                    kept.append(fitting)
                elif self.config.truncation_strategy == "raise":
                    problems.append(too_long(sample, self.config))
                counts[number] += (fitting is not None, fitting is not None and fitting is not sample, fitting is None)
        asked = [(number, text) for number, row in good for text in turns_asked(row)]
        return Encoded(
            block=Block.of(kept),
            usable=usable,
            counts=counts,
            digests=digests_of(row_content(row) if isinstance(row, Row) else None for row in found),
            asked=digests_of(text for _, text in asked),
            asked_rows=np.array([number for number, _ in asked], np.int64),
            dropped=dropped,
            problems=problems[:MAX_LISTED],
            num_problems=len(problems),
        )

    def _without_embedding(self, samples: Sequence[Sample]) -> list[Problem]:
        return [
            Problem(f"{sample.place}: token id {largest}", f"ids below the model's vocab_size {self.vocab_size}")
            for sample in samples
            if (largest := max(sample.token_ids)) >= self.vocab_size
        ]


def _with_places(problems: Sequence[Problem], places: Sequence[str]) -> dict[str, Problem]:
    """The first problem of each row that has some: its subject is the row's place, or begins with it."""
    if not problems:
        return {}
    known = set(places)
    found: dict[str, Problem] = {}
    for problem in problems:
        # `file:12: messages[1]`: the place ends at one of the colons.
        parts = problem.subject.split(":")
        names = (":".join(parts[:count]) for count in range(len(parts), 0, -1))
        place = next((name for name in names if name in known), problem.subject)
        found.setdefault(place, problem)
    return found


def read_vocab_size(hf_dir: Path) -> int:
    """`vocab_size` of a Hugging Face folder's `config.json`.

    Raises:
        DataError: The file is missing or has none.
    """
    path = hf_dir / "config.json"
    try:
        vocab_size: Any = json.loads(path.read_text()).get("vocab_size")
    except (OSError, ValueError, AttributeError) as exc:
        raise DataError("the model's configuration can't be read", [Problem(str(path), found=str(exc))]) from exc
    if not isinstance(vocab_size, int):
        raise DataError(
            "the model's configuration can't be used", [Problem(f"{path}: vocab_size", "an integer", repr(vocab_size))]
        )
    return vocab_size
