"""A store with runs whose files are of the stages' own formats, and hostile in every text that comes from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcore.artifacts import Store
from mcore.evaluate.compare import to_json
from mcore.evaluate.comparison import (
    CaseComparison,
    Comparison,
    GateResult,
    GroupComparison,
    SetComparison,
    Side,
)
from mcore.metrics import append_metrics
from mcore.runs import Failure, RunRecord, StageRecord, State, begin, end
from mcore.verify.report import (
    NoiseResult,
    NumericalResult,
    PointResult,
    PromptResult,
    StructuralResult,
    TensorFinding,
    VerifyReport,
)

HOSTILE = "<script>alert('x')</script><img src=http://example.invalid/x.png onerror=alert(1)>\"'&{{ 7 * 7 }}"
STARTED, ENDED = "2026-11-24T07:00:00.000000+00:00", "2126-11-24T07:30:00.000000+00:00"
INPUTS = {
    "prepare": {"hf": "local/hhhh"},
    "convert": {"hf": "local/hhhh"},
    "verify_convert": {"hf": "local/hhhh", "mcore": "convert/k-convert"},
    "train": {"base": "convert/k-convert", "data": "prepare/k-prepare"},
    "evaluate_base": {"model": "local/hhhh"},
    "evaluate_tuned": {"model": "train/k-train"},
    "compare": {"base": "evaluate/k-evaluate_base", "tuned": "evaluate/k-evaluate_tuned"},
}
"""Stages and what they are made from; keys are `k-` and the stage's name."""
DURATION_S = {"convert": 10.0, "train": 1800.0}


def kind_of(name: str) -> str:
    return name.partition("_")[0]


def verify_report(*, error: float = 2e-6, broken: bool = False) -> str:
    """`report.json` of a proof, whose head is off by `error`."""
    prompt = PromptResult(
        prompt=HOSTILE, num_tokens=96, relative_error=error, max_abs=1e-6, mean_abs=1e-7, hf_std=1.0,
        mean_cosine=1.0, min_cosine=0.999, top1_agreement=1.0, worst_position=3,
    )  # fmt: skip
    findings = (TensorFinding(tensor=f"model.{HOSTILE}", kind="differs", detail="3 of 9 values"),) if broken else ()
    structural = StructuralResult(
        num_hf_tensors=20, num_mcore_tensors=14, num_bytes=400, casts=(), cast_to=None, ignored_hf=(),
        findings=findings, seconds=0.1,
    )  # fmt: skip
    points = {"embedding": 0.0, "layers.0.attention": 3.7e-7, "layers.0.mlp": 8e-7, "head": error}
    numerical = NumericalResult(
        max_relative_error=1e-4, prompt_source="texts", prompt_digest="f" * 64, device="cpu", rounded_to=None,
        prompts=(prompt,), points=tuple(PointResult(point=name, relative_error=of) for name, of in points.items()),
        seconds=0.1,
    )  # fmt: skip
    noise = NoiseResult(dtype="bfloat16", hf_noise=0.004, mcore_noise=0.005, max_noise_ratio=1.5, seconds=0.1)
    report = VerifyReport(
        hf="model", mcore="checkpoint", family="llama", versions={}, structural=structural, numerical=numerical,
        noise=noise, passed=not broken and error <= 1e-4,
    )  # fmt: skip
    return report.model_dump_json()


def comparison() -> str:
    """`comparison.json` of twelve cases, the last of them a regression."""

    def side(num_passed: int, perplexity: float) -> Side:
        return Side(
            suite="small", num_cases=12, num_passed=num_passed, perplexity=perplexity, num_perplexity_tokens=30,
            max_tokens=16, max_model_len=128, system=None, dtype="float32", device="cpu", vllm_version="0.32.0",
            answer_s=2.0, num_answer_tokens=3000, first_token_s=0.25,
        )  # fmt: skip

    cases = tuple(
        CaseComparison(
            group="identity", case=case, prompt=f"question {case}", expectation=f"equals {HOSTILE}",
            base_answer=HOSTILE, base_passed=case == 12, tuned_answer="half a pair [half]" if case == 12 else "I am.",
            tuned_passed=case != 12, tuned_failures=("wrong",) if case == 12 else (),
        )
        for case in range(1, 13)
    )  # fmt: skip
    return to_json(
        Comparison(
            base=side(1, 264.3), tuned=side(11, 1.25), cases=cases, perplexity_ratio=0.005,
            groups=(
                GroupComparison(
                    group="identity", num_cases=12, base_passed=1, tuned_passed=11, lost=1, gained=11, forgetting=True,
                    change_interval=(0.21, 0.98),
                ),
            ),
            perplexity_sets=(
                SetComparison(
                    name=f"held_out{HOSTILE}", num_tokens=30, num_rows=3, base=264.3, tuned=1.25, ratio=0.00473,
                    ratio_interval=(0.004, 0.006), forgetting=False,
                ),
            ),
            gates=(GateResult(gate="min_pass_rate", subject="all cases", limit=0.5, found=0.75, passed=True),),
        )
    )  # fmt: skip


DATA_REPORT: dict[str, Any] = {
    "rows": 1000,
    "samples": 970,
    "validation_samples": 7,
    "tokens": 54321,
    "trained_tokens": 12345,
    "trained_share": 0.2273,
    "longest": 99,
    "sources": [{"name": f"rows{HOSTILE}.jsonl", "rows": 900, "taken": 900, "used": 870}],
    "dropped": {"empty_answer": {"count": 30, "examples": [f"row 7: {HOSTILE}", f"row 8: {HOSTILE}"]}},
    "over_length": {"left_out": 5, "cut": 0},
    "lengths": {"up to 64": 700, "65-128": 270},
    "duplicates": 4,
    "overlap_with_validation": 2,
    "packed_fill": {"16": 0.9123, "64": 0.9912},
}


def write_metrics(path: Path, *, mfu: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 31):
        step = {"loss": 5.0 / number, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 900.0 + number, "mfu": mfu}
        append_metrics(path, {"iteration": number, **step})
    for number, loss in ((0, 5.5), (15, 0.9), (30, 0.4321)):
        append_metrics(path, {"iteration": number, "validation_loss": loss})


def write_files(folder: Path, name: str, *, mfu: float | None = None) -> None:
    """What the page reads of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(name)
    if name == "train":
        write_metrics(folder / "metrics.jsonl", mfu=mfu)
    elif name == "prepare":
        (folder / "data_report.json").write_text(json.dumps(DATA_REPORT))
    elif name == "verify_convert":
        (folder / "report.json").write_text(verify_report())
    elif name == "compare":
        (folder / "comparison.json").write_text(comparison().replace("[half]", "\\ud800"))
    elif kind_of(name) == "evaluate":
        (folder / "summary.json").write_text(json.dumps({"device": "cpu", "tensor_parallel_size": 1}))


def commit(store: Store, name: str, key: str = "", *, lr: float = 0.1, mfu: float | None = None) -> None:
    """Make a stage's artifact."""
    kind, key = kind_of(name), key or f"k-{name}"
    write_files(store.partial(kind, key), name, mfu=mfu)
    config: dict[str, Any] = {"prepare": {"data.dataset": ["d" * 64 + "#500"]}, "train": {"train.lr": lr}}.get(name, {})
    store.commit(
        kind, key, inputs=INPUTS[name], input_content={},
        ingredients={"stage": kind, "version": 1, "inputs": INPUTS[name], "config": config},
        metrics={"tuned_pass_rate": 0.75} if name == "compare" else {},
        versions={"code": "c0ffee", "torch": "2.13.0" if mfu else "2.13.0+cpu", HOSTILE: HOSTILE},
        duration_s=DURATION_S.get(name, 1.0),
    )  # fmt: skip


def make_run(
    store: Store,
    name: str,
    *,
    state: State = "done",
    until: str | None = None,
    cached: tuple[str, ...] = (),
    mfu: float | None = None,
    made: bool = True,
) -> RunRecord:
    """A run and its record, which ended at the stage `until` unless it is done."""
    stages = tuple(StageRecord(one, kind_of(one), f"k-{one}", inputs) for one, inputs in INPUTS.items())
    config = {"model": {"source": f"org/{HOSTILE}"}, "launch": {"nproc_per_node": 2}}
    record = RunRecord(name, "pipeline", config, stages, "", 1, STARTED)
    begin(store, record)
    outcomes: dict[str, Any] = {}
    for one in INPUTS:
        if one == until:
            break
        if made and store.find(kind_of(one), f"k-{one}") is None:
            commit(store, one, mfu=mfu)
        outcomes[one] = {"cached": one in cached, "seconds": 2.0}
    failure = None
    if until is not None:
        failure = Failure(until, f"{kind_of(until)}/k-{until}", "GateError", f"no: {HOSTILE}")
    ended = RunRecord(
        name, "pipeline", config, stages, "", 1, STARTED, ended=ENDED, state=state, outcomes=outcomes, failure=failure
    )
    end(store, ended)
    return ended
