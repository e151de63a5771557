"""How many rows of each source a run takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from configs.schema.data import DataConfig
from mcore.data.prepare.select import select


def write(path: Path, num_rows: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{path.stem} {row}"}) + "\n" for row in range(num_rows)))
    return str(path)


@pytest.mark.parametrize(
    ("strategy", "counts"), [("first_exhausted", (300, 100)), ("all_exhausted", (900, 300))], ids=str
)
def test_entries_are_mixed_by_their_shares(tmp_path: Path, strategy: str, counts: tuple[int, int]) -> None:
    files = (write(tmp_path / "a.jsonl", 300), write(tmp_path / "b.jsonl", 300))
    config = DataConfig(dataset=files, interleave_prob=(3, 1), stopping_strategy=strategy)
    found = select(config)
    of_first = found.train < len(found.taken[0])
    assert (int(of_first.sum()), int((~of_first).sum())) == counts
    repeats = np.unique(found.train[of_first], return_counts=True)[1]
    assert set(repeats.tolist()) == {counts[0] // 300}


@pytest.mark.parametrize("dataset", [("a.jsonl",), ("a.jsonl#5", "b.jsonl")])
def test_shares_that_are_of_other_entries_are_refused(dataset: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="interleave_prob"):
        DataConfig(dataset=dataset, interleave_prob=(3, 1))
