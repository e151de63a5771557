"""Attention of samples that ranks share is that of whole samples, gradients included, and sees nothing later."""

from __future__ import annotations

from pathlib import Path

from tests.parallel.context_cases import KINDS
from tests.parallel.launch import run_torchrun


def test_shared_samples_are_attended_to_like_whole_ones(tmp_path: Path) -> None:
    output = run_torchrun(4, Path(__file__).with_name("context_cases.py"), folder=tmp_path)
    assert f"checked {len(KINDS)} kinds" in output
