"""Runs that are through, as far as the store can tell: real manifests, proofs and comparisons of made-up models."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from mcore.artifacts import Store, publish_link
from mcore.evaluate.compare import flat_metrics, to_json
from mcore.evaluate.comparison import CaseComparison, Comparison, GateResult, GroupComparison, Side
from mcore.runs import begin, end
from tasks.graph import StagePlan
from tasks.preflight import CheckedRun
from tests.unit.flows.made_runs import ENDED, checked_run, commit, record_of

PROVEN = {
    "passed": True, "num_tensors": 21, "num_differing_tensors": 0, "relative_error": 2e-6, "max_relative_error": 1e-4,
    "top1_agreement": 1.0,
}  # fmt: skip


def side(passed: int, cases: int, perplexity: float | None) -> Side:
    return Side(
        suite="small", num_cases=cases, num_passed=passed, perplexity=perplexity, num_perplexity_tokens=30,
        max_tokens=64, max_model_len=64, system=None, dtype="bfloat16", device="cpu", vllm_version="0.0",
    )  # fmt: skip


def comparison(passed: str, *, perplexity: float | None = 2.0, limit: float | None = 0.5) -> Comparison:
    """A comparison with a base that passes nothing; `passed` has a `1` for each case that the tuned model passes."""
    cases = tuple(
        CaseComparison(
            group="identity", case=number, prompt=f"{number}?", expectation="bot", base_answer="no", base_passed=False,
            tuned_answer="bot", tuned_passed=letter == "1", tuned_failures=(),
        )
        for number, letter in enumerate(passed, 1)
    )  # fmt: skip
    rate = passed.count("1") / len(passed)
    gates = (
        ()
        if limit is None
        else (GateResult(gate="min_pass_rate", subject="all cases", limit=limit, found=rate, passed=rate >= limit),)
    )
    return Comparison(
        base=side(0, len(passed), None if perplexity is None else 9.0),
        tuned=side(passed.count("1"), len(passed), perplexity),
        groups=(
            GroupComparison(
                group="identity", num_cases=len(passed), base_passed=0, tuned_passed=passed.count("1")
            ),
        ),
        cases=cases,
        perplexity_ratio=None if perplexity is None else perplexity / 9.0,
        gates=gates,
    )  # fmt: skip


def through(
    raw: dict[str, Any],
    *,
    answers: Comparison | None = None,
    proven: dict[str, Any] | None = None,
    weights: str | None = None,
    source: str | None = None,
    until: str = "promote",
    **changes: Any,
) -> tuple[CheckedRun, dict[str, str]]:
    """Run a run up to its promotion.

    Args:
        raw: The run.
        answers: What the comparison came to.
        proven: Figures of the proof of the export.
        weights: What the exported file holds; something of its own if not given.
        source: What its base was fetched from; a local folder if not given.
        until: Stage that is not made any more.
        changes: Fields of the run: `train__seed=1`.

    Returns:
        The run, and its artifacts by stage.
    """
    gated = {"evaluate__min_pass_rate": 0.5, "promote__alias": "production"}
    checked = checked_run(raw, **(gated | changes))
    store = Store(checked.run.launch.store)
    record = record_of(checked)
    begin(store, record)
    fetched = f"fetch/{'f' * 20}"
    if source is not None:
        plan = StagePlan("fetch", "fetch", "f" * 20, {"source": source}, {})
        commit(store, plan, text="base")
    for plan in checked.stages:
        if source is not None:
            inputs = {role: fetched if name.startswith("local/") else name for role, name in plan.inputs.items()}
            plan = replace(plan, inputs=inputs)
        if plan.name == until:
            break
        if store.find(plan.kind, plan.key) is not None:
            continue
        folder = store.partial(plan.kind, plan.key)
        folder.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Any] = {}
        if plan.kind == "verify":
            figures = PROVEN | (proven or {} if plan.name == "verify_export" else {})
            (folder / "report.json").write_text(json.dumps({"passed": figures["passed"]}))
        if plan.kind == "compare":
            compared = answers or comparison("1100")
            figures = flat_metrics(compared)
            (folder / "comparison.json").write_text(to_json(compared))
        if plan.kind == "export":
            (folder / "config.json").write_text("{}")
            (folder / "adapter").mkdir()
            (folder / "adapter" / "adapter_model.safetensors").write_text(weights or plan.key)
            (folder / "LICENSE").write_text("terms")
        text = weights if weights is not None and plan.kind == "export" else f"{plan.name} {plan.key}"
        commit(store, plan, text=text, metrics=figures)
    artifacts = {plan.name: plan.artifact for plan in checked.stages}
    kind, _, key = artifacts["export"].partition("/")
    publish_link(store.run_dir(record.name) / "model", store.path(kind, key))
    end(store, replace(record, state="done", ended=ENDED))
    store.digests.save()
    return checked, artifacts
