"""Folders as `mcore.evaluate run` writes them, with answers of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from configs.schema.suite import Case
from mcore.evaluate.engine import Answer
from mcore.evaluate.suites import Question, score

QUESTION = "Say yes."


def perplexity_set(rows: Sequence[tuple[float, int]], *, forgetting: bool = False) -> dict[str, Any]:
    """A perplexity set of rows of (sum of losses in nats, tokens), as `summary.json` holds it."""
    losses, tokens = zip(*rows, strict=True)
    return {
        "perplexity": exp(sum(losses) / sum(tokens)),
        "num_tokens": sum(tokens),
        "forgetting": forgetting,
        "row_losses": losses,
        "row_tokens": tokens,
    }


def write_evaluation(
    folder: Path, passed: Mapping[str, Sequence[bool]], forgetting: Sequence[str] = (), **summary: Any
) -> Path:
    """An evaluation with one case for each entry of `passed`, by group; `summary` replaces fields of `summary.json`.

    Groups in `forgetting` are marked as such.
    """
    questions = [
        Question(
            group,
            number,
            Case(prompt=QUESTION, equals="yes"),
            [{"role": "user", "content": QUESTION}],
            group in forgetting,
        )
        for group, found in passed.items()
        for number in range(1, len(found) + 1)
    ]
    texts = ["yes" if one else "no" for found in passed.values() for one in found]
    records = score(questions, [Answer(text, [1, 2], [3, 4, 5], "stop") for text in texts])
    fields = {
        "suite": "small",
        "num_cases": len(records),
        "num_passed": sum(record["passed"] for record in records),
        "perplexity": 8.0,
        "num_perplexity_tokens": 100,
        "max_tokens": 64,
        "max_model_len": 1024,
        "system": None,
        "dtype": "float32",
        "device": "cpu",
        "vllm_version": "0.32.0",
    }
    folder.mkdir()
    (folder / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps(fields | summary))
    return folder
