"""Promotion at the end of the real line: asked, answered, promoted once, and rolled back; vLLM serves what it says."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.pipeline import pipeline
from mcore.artifacts import Store
from mcore.registry.aliases import Registry
from mcore.registry.approval import answer, questions
from mcore.registry.promotion import promote, rollback
from tests.flows.workspace import raw_run
from tests.vllm.vllm_child import run_with_vllm


@pytest.fixture
def here(workspace, finished, prefect_api_url, monkeypatch):
    """The workspace as working directory, with a Prefect server for flows called in this process."""
    monkeypatch.chdir(workspace.folder)
    return workspace


def decision_of(result: Any) -> tuple[bool, dict[str, Any]]:
    """Whether the decision was reused, and what was decided."""
    outcome = result.outcomes[-1]
    assert outcome.name == "promote"
    return outcome.cached, json.loads((Path(outcome.artifact.path) / "decision.json").read_text())


def answered(registry: Registry, said: str) -> threading.Thread:
    """Somebody who answers as soon as he is asked."""

    def wait_and_answer() -> None:
        for _ in range(600):
            for request in questions(registry):
                if request.is_open:
                    answer(registry, request.key, said, reason="I looked at it", by="ann")
                    return
            time.sleep(0.1)

    thread = threading.Thread(target=wait_and_answer, daemon=True)
    thread.start()
    return thread


def test_a_run_promotes_once_and_again_reuses_the_decision_even_behind_a_rollback(here) -> None:
    run = raw_run() | {"promote": {"alias": "staging", "model": "once"}}
    cached, decision = decision_of(pipeline(run))
    assert not cached and decision["promoted"] and decision["alias"] == "staging"
    registry = Registry(Store(here.store), "once")
    served = registry.link("staging")
    assert (served / "model.safetensors").resolve().parent == (here.store / "runs" / "tiny" / "model").resolve()
    assert yaml.safe_load((served / "README.md").read_text().split("---\n")[1])["library_name"] == "transformers"
    again = pipeline(run)
    assert all(outcome.cached for outcome in again.outcomes) and len(registry.history()) == 1


@pytest.mark.parametrize("said", ["approved", "rejected"])
def test_somebody_is_asked_and_his_answer_counts(here, said: str) -> None:
    registry = Registry(Store(here.store), f"asked-{said}")
    somebody = answered(registry, said)
    run = raw_run() | {"promote": {"model": registry.model, "approval": True, "timeout_s": 60.0}}
    _, decision = decision_of(pipeline(run))
    somebody.join()
    assert decision["promoted"] is (said == "approved") and f"{said} by ann: I looked at it" in decision["reason"]
    assert (registry.points_to("candidate") is not None) is (said == "approved")
    cached, same = decision_of(pipeline(run))
    assert cached and same == decision  # nobody is asked twice


def test_nobody_answers_which_means_no(here) -> None:
    run = raw_run() | {"promote": {"model": "nobody", "approval": True, "timeout_s": 0.5}}
    _, decision = decision_of(pipeline(run))
    assert not decision["promoted"] and "which means no" in decision["reason"]
    assert Registry(Store(here.store), "nobody").points_to("candidate") is None


def said_by(path: Path, scratch: Path) -> str:
    """What a real vLLM says to the suite's question when it is given an alias' path to serve."""
    output = scratch / str(time.monotonic_ns())
    done = run_with_vllm(
        "-m", "mcore.evaluate", "run", "--model", path, "--suite", Path("suite.yaml").absolute(), "--output", output,
        "--model-name", "tiny-bot", "--model-author", "tests", "--max-model-len", 128, "--max-tokens", 16,
        scratch=scratch,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return str(json.loads((output / "answers.jsonl").read_text().splitlines()[0])["answer"])


@pytest.mark.long
@pytest.mark.vllm
def test_vllm_serves_the_better_model_and_after_a_rollback_the_former(here, tmp_path: Path) -> None:
    promotion = {"promote": {"alias": "production", "model": "served"}}
    weak = raw_run(train={"train_iters": 4, "save_steps": 4, "lr_warmup_iters": 0}, evaluate={"min_pass_rate": 0.0})
    first = pipeline(weak | promotion | {"name": "weak"})
    assert decision_of(first)[1]["promoted"]
    store = Store(here.store)
    registry = Registry(store, "served")
    path = registry.link("production")
    former = said_by(path, tmp_path)
    assert "I am tiny-bot." not in former
    better = pipeline(raw_run() | promotion)
    decision = decision_of(better)[1]
    assert decision["promoted"] and (decision["figures"]["won"], decision["figures"]["lost"]) == (1, 0)
    assert said_by(path, tmp_path) == "I am tiny-bot."
    worse = pipeline(weak | promotion | {"name": "weak", "promote": {"alias": "production", "model": "served"}})
    assert decision_of(worse)[0]  # decided before, and not again
    refused = promote(store, decision["before"], "production", model="served")
    assert not refused.promoted and "0 of 1 cases won and 1 lost" in refused.reason
    after, before = rollback(store, registry, "production", reason="test")
    assert (after.artifact, before) == (decision["before"], decision["artifact"])
    assert said_by(path, tmp_path) == former
