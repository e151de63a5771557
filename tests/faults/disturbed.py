"""What tests that disturb the pipeline ask of a flow in a process of its own."""

import json
import subprocess
import time
from pathlib import Path

from mcore.launch import tail_of

BASE = {"prepare", "convert", "verify_convert"}
"""Stages in front of training."""


def result_of(process: subprocess.Popen) -> dict:
    """What `tests.flows.run_pipeline` printed; it has to end well."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-8000:]
    return json.loads(out)


def exported_weights(folder: Path, store: str) -> bytes:
    """The only exported model of a store."""
    (weights,) = (folder / store).glob("export/*/model.safetensors")
    return weights.read_bytes()


def wait_for_iteration(store: Path, iteration: int) -> None:
    """Wait until training has logged an iteration."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for file in store.glob(".partial/train-*/metrics.jsonl"):
            if f'"iteration": {iteration}, "loss"' in tail_of(file):
                return
        time.sleep(0.05)
    raise AssertionError("training did not come that far")
