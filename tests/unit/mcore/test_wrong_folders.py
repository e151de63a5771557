"""Every stage's command on folders and files that are missing, empty or of another kind: status 2, nothing written."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcore.child import run_as_child
from mcore.errors import EXIT_INPUT
from tests.unit.tasks.model_folders import listing, write_workspace

WRONG = ("missing", "empty", "file", "bytes", "junk", "tracked", "cut", "damaged")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sound model, run and suite, and beside them what a user may name in their place."""
    before = dict(os.environ)
    folder = tmp_path / "here"
    write_workspace(folder)
    (folder / "empty").mkdir()
    (folder / "file").write_text("text\n")
    (folder / "bytes").write_bytes(bytes(range(256)))
    (folder / "junk").mkdir()
    (folder / "junk" / "config.json").write_text("{}")
    (folder / "tracked" / "hf").mkdir(parents=True)  # a checkpoint whose iteration is gone
    (folder / "tracked" / "latest_checkpointed_iteration.txt").write_text("5")
    (folder / "cut" / "iter_0000005").mkdir(parents=True)  # one that was killed before it was written
    (folder / "damaged").mkdir()
    (folder / "damaged" / ".metadata").write_bytes(b"garbage")
    (folder / "damaged" / "metadata.json").write_text("{}")
    monkeypatch.chdir(folder)
    yield folder
    os.environ.clear()  # the evaluation prepares vLLM's
    os.environ.update(before)


@pytest.fixture
def refused(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run `python -m MODULE WORDS` in this process on what it must refuse; gives its findings."""

    def run(module: str, *words: str) -> list[str]:
        app = importlib.import_module(f"{module}.__main__").app
        monkeypatch.setattr(sys, "argv", [module, *words])
        before = listing(here)
        with pytest.raises(SystemExit) as ended:
            run_as_child(lambda: app(standalone_mode=False) if module == "mcore.train" else app())
        said = capfd.readouterr()
        told = f"{module} {' '.join(words)}: {ended.value.code}\n{said.err}"
        assert ended.value.code == EXIT_INPUT and "Traceback" not in said.err, told
        assert listing(here) == before and said.out == "", told
        findings = [line for line in said.err.splitlines() if line.startswith("  - ")]
        assert findings, told
        return findings

    return run


@pytest.mark.parametrize("wrong", WRONG)
def test_conversion_and_proof(refused: Callable[..., list[str]], wrong: str) -> None:
    refused("mcore.bridge", "convert", "--hf", wrong, "--output", "out")
    refused("mcore.bridge", "convert", "--hf", wrong, "--output", "out", "--dry-run")
    refused("mcore.bridge", "export", "--checkpoint", wrong, "--hf", "model", "--output", "out")
    refused("mcore.verify", "--hf", wrong, "--mcore", wrong, "--output", "out")
    refused("mcore.verify", "--hf", "model", "--mcore", wrong, "--output", "out")


@pytest.mark.parametrize("wrong", WRONG)
def test_training(refused: Callable[..., list[str]], wrong: str) -> None:
    refused("mcore.train", "run.yaml", "--base", wrong, "--output", "out")
    refused("mcore.train", wrong, "--base", "model", "--output", "out")


@pytest.mark.parametrize("wrong", WRONG)
def test_sources(refused: Callable[..., list[str]], wrong: str) -> None:
    for source in (wrong, f"./{wrong}"):
        refused("mcore.sources", "fetch", source, "--output", "out")
        refused("mcore.sources", "locate", source)


@pytest.mark.parametrize("wrong", WRONG)
def test_evaluation(refused: Callable[..., list[str]], wrong: str) -> None:
    refused("mcore.evaluate", "compare", "--base", wrong, "--tuned", wrong, "--output", "out")
    refused("mcore.evaluate", "run", "--model", wrong, "--suite", wrong, "--output", "out")
    beside = ["--model", "model", "--suite", "suite.yaml", "--torch-dtype", "float32"]
    refused("mcore.evaluate", "run", *beside, "--adapter", wrong, "--output", "out")
    refused("mcore.evaluate", "run", *beside, "--perplexity", wrong, "--output", "out")


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_an_output_that_can_not_be(refused: Callable[..., list[str]], output: str) -> None:
    to = ["--output", output]
    refused("mcore.bridge", "convert", "--hf", "model", *to)
    refused("mcore.bridge", "export", "--checkpoint", "tracked", *to)
    refused("mcore.verify", "--hf", "model", "--mcore", "tracked", *to)
    refused("mcore.sources", "fetch", "smollm2-135m-instruct", *to)
    refused("mcore.evaluate", "run", "--model", "model", "--suite", "suite.yaml", *to)
    refused("mcore.verify.mutants", *to)


def test_both_folders_of_a_comparison_are_named(refused: Callable[..., list[str]]) -> None:
    findings = refused("mcore.evaluate", "compare", "--base", "missing", "--tuned", "empty", "--output", "out")
    assert any("missing" in finding for finding in findings) and any("empty" in finding for finding in findings)
