"""The estimate of memory in layouts of two processes against the bytes that each of them holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.launch import run_torchrun

SCRIPT = Path(__file__).with_name("memory_cases.py")
DIVIDED = ("main_weights", "moments")


@pytest.mark.layouts
def test_every_rank_holds_what_is_estimated(tmp_path: Path) -> None:
    run_torchrun(2, SCRIPT, tmp_path, folder=tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) > 9 * 4
    wrong = []
    for rank, found in enumerate(ranks):
        for case, part, measured, estimated in found:
            # Where data parallel ranks share the optimizer, its parts are of the buffer, not of the parameters in it.
            near = 0.05 if part == "activations" else 0.01 if part in DIVIDED else 0.0
            if estimated != pytest.approx(measured, rel=near, abs=0):
                wrong.append((rank, case, part, measured, estimated))
    assert not wrong
