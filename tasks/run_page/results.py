"""Proofs and comparison for the page, from `report.json` and `comparison.json` of the stages that made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tasks.run_page.charts import errors_of_parts
from tasks.run_page.facts import RunFacts, StageFacts

CASES_PER_GROUP = 8
"""Answers that are shown of a group, regressions first; `comparison.json` has all."""


def figure(value: Any) -> str:
    """A figure as people read it; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def verdict(passed: bool) -> Markup:
    """In words, so that nobody has to tell colours apart."""
    return Markup('<span class="good">passed</span>') if passed else Markup('<span class="bad">FAILED</span>')


def number(value: Any) -> float:
    """A figure of a report, which writes NaN and Infinity as words; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def proof_parts(facts: RunFacts) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    """Each proof with its parts, prompts and findings, and a row for each thing that it proves."""
    proofs, rows = [], []
    for stage in facts.reached:
        report = stage.read("report.json") if stage.record.kind == "verify" else {}
        if report:
            proofs.append(_proof(stage.record.name, report))
            rows += _rows(stage, report)
    return proofs, rows


def _proof(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    numerical = report.get("numerical") or {}
    gate = number(numerical.get("max_relative_error"))
    points = [(str(point["point"]), number(point["relative_error"])) for point in numerical.get("points", ())]
    prompts = [(prompt, number(prompt["relative_error"])) for prompt in numerical.get("prompts", ())]
    findings = (report.get("structural") or {}).get("findings", ())
    return {
        "name": name,
        "picture": errors_of_parts(f"{name}: relative error of each part", points, gate) if gate > 0 else None,
        "points": [(point, figure(error), f"{gate:g}", verdict(error <= gate)) for point, error in points],
        "prompts": [
            (
                prompt["prompt"], prompt["num_tokens"], figure(error), f"{gate:g}",
                f"{number(prompt['min_cosine']):.9f}", f"{number(prompt['top1_agreement']):.2%}",
            )
            for prompt, error in prompts
        ],
        "findings": [(finding["tensor"], finding["kind"], finding["detail"]) for finding in findings],
    }  # fmt: skip


def _rows(stage: StageFacts, report: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    name, rows = stage.record.name, []
    structural, numerical, noise = (report.get(part) for part in ("structural", "numerical", "noise"))
    if structural:
        differing, total = len(structural["findings"]), structural["num_hf_tensors"]
        what = f"bits of {total:,} tensors read from disk again"
        rows.append((name, what, f"{differing} differ", "0 differ", verdict(not differing and total > 0)))
    if numerical:
        gate = number(numerical["max_relative_error"])
        errors = [number(prompt["relative_error"]) for prompt in numerical["prompts"]]
        worst = next((error for error in errors if error != error), max(errors, default=float("nan")))
        what = f"fp32 logits of both models over {len(errors)} prompts, on {numerical['device']}"
        rows.append((name, what, figure(worst), f"{gate:g}", verdict(worst <= gate)))
    if noise:
        hf, mcore = number(noise["hf_noise"]), number(noise["mcore_noise"])
        ratio, gate = mcore / hf if hf > 0 else float("nan"), number(noise["max_noise_ratio"])
        what = f"noise of {noise['dtype']}, megatron-core over transformers"
        rows.append((name, what, figure(ratio), f"{gate:g}", verdict(ratio <= gate)))
    return rows + [(name, f"not compared: {why}", "", "", verdict(False)) for why in report.get("not_compared", ())]


def comparison_parts(facts: RunFacts) -> dict[str, Any] | None:
    """Groups, gates and answers of both models; None if they were not compared."""
    stage = facts.stage("compare")
    found = stage.read("comparison.json") if stage else {}
    if not found:
        return None
    lost = {(case["group"], case["case"]) for case in found.get("regressions", ())}
    examples, shown = [], 0
    for group in found.get("groups", ()):
        cases = [case for case in found.get("cases", ()) if case["group"] == group["group"]]
        cases.sort(key=lambda case: (case["group"], case["case"]) not in lost)
        examples.append((group["group"], [_case(case) for case in cases[:CASES_PER_GROUP]]))
        shown += len(cases[:CASES_PER_GROUP])
    gates = [
        (gate["gate"], gate["subject"], figure(gate["limit"]), figure(gate["found"]), verdict(bool(gate["passed"])))
        for gate in found.get("gates", ())
    ]
    left_out = len(found.get("cases", ())) - shown
    return {
        "groups": [_group(one) for one in found.get("groups", ())],
        "perplexities": _perplexities(found),
        "speeds": [row for side in ("base", "tuned") if (row := _speed(side, found.get(side) or {}))],
        "gates": gates,
        "examples": examples,
        "left_out": left_out,
    }


FORGETTING = " (must not be forgotten)"


def _group(one: Mapping[str, Any]) -> tuple[Any, ...]:
    change, interval = one["tuned_passed"] - one["base_passed"], ""
    if one.get("change_interval"):
        low, high = (100 * number(end) for end in one["change_interval"])
        interval = f"{low:+.1f} to {high:+.1f}"
    return (
        one["group"] + FORGETTING * bool(one.get("forgetting")), one["num_cases"], one["base_passed"],
        one["tuned_passed"], f"{change:+d}" if change else "0", interval, one.get("lost", ""), one.get("gained", ""),
    )  # fmt: skip


def _perplexities(found: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A row a set; of a comparison without sets that of the held-out rows."""
    rows = []
    for one in found.get("perplexity_sets", ()):
        low, high = (number(end) for end in one["ratio_interval"])
        rows.append((
            one["name"] + FORGETTING * bool(one["forgetting"]), one["num_rows"], one["num_tokens"], figure(one["base"]),
            figure(one["tuned"]), f"{number(one['ratio']):.4g}", f"{low:.3f} to {high:.3f}",
        ))  # fmt: skip
    base, tuned = (number((found.get(side) or {}).get("perplexity")) for side in ("base", "tuned"))
    if not rows and base == base and tuned == tuned:
        tokens = found["tuned"].get("num_perplexity_tokens", "")
        rows.append(("held out", "", tokens, figure(base), figure(tuned), f"{tuned / base:.4g}", ""))
    return rows


def _speed(side: str, of: Mapping[str, Any]) -> tuple[str, str, str] | None:
    seconds, tokens, first = (number(of.get(name)) for name in ("answer_s", "num_answer_tokens", "first_token_s"))
    if not (seconds > 0 and tokens > 0):
        return None
    return side, f"{tokens / seconds:,.0f}", figure(first) if first == first else ""


def _case(case: Mapping[str, Any]) -> tuple[Any, ...]:
    def answer(side: str) -> Markup:
        return Markup("{}: {}").format(verdict(bool(case[f"{side}_passed"])), case[f"{side}_answer"] or "(nothing)")

    return case["prompt"], case["expectation"], answer("base"), answer("tuned")
