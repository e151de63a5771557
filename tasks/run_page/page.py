"""Write the page of a run: `<store>/runs/<name>/report.html`, for a run that is done, failed or was killed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from mcore.artifacts import Store
from mcore.folders import write_durably
from mcore.runs import RunRecord
from mcore.wording import duration, moment, size
from tasks.loss_curve import loss_points
from tasks.report import HTML_PAGE
from tasks.run_page.charts import curves
from tasks.run_page.data import data_parts
from tasks.run_page.facts import RunFacts
from tasks.run_page.results import comparison_parts, figure, proof_parts

SHORT = 12
"""Digits of a digest that people compare; the whole is in the manifest."""


def write_page(store: Store, record: RunRecord) -> Path:
    """Write the page of one attempt of a run into the run's folder, from what the store has.

    Returns:
        The page.
    """
    page = store.run_dir(record.name) / HTML_PAGE
    # Half a character, which a model may have said, can't be written.
    write_durably(page, page_of(RunFacts(store, record)).encode(errors="replace").decode())
    return page


def page_of(facts: RunFacts) -> str:
    """The page as one HTML document; every text from outside is escaped."""
    record = facts.record
    proofs, proof_rows = proof_parts(facts)
    parts: dict[str, Any] = {
        "run": record,
        "source": record.config.get("model", {}).get("source", ""),
        "failure": _failure(facts),
        "figures": _figures(facts),
        "stages": [
            (stage.record.name, stage.state, _time(stage.seconds), stage.why, stage.record.artifact)
            for stage in facts.stages
        ],
        **_cost(facts),
        **data_parts(facts),
        **_training(facts),
        "proofs": proofs,
        "proof_rows": proof_rows,
        "comparison": comparison_parts(facts),
        **_lineage(facts),
        "settings": json.dumps(record.config, indent=2, ensure_ascii=False),
    }
    return _template().render(parts)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["moment"] = moment
    return environment.get_template("page.html.jinja")


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _failure(facts: RunFacts) -> dict[str, Any] | None:
    """What went wrong: the digest that the stage left, or what the record says if it left none."""
    failure = facts.record.failure
    if failure is None:
        return None
    known = {"stage": failure.stage, "error": failure.error, "message": failure.summary}
    blank = dict.fromkeys(("kind", "cause", "next", "signal", "log"), "")
    return {**blank, "rank": None, "exit_status": None, "attempt": 1, "tail": [], **known, **facts.failure}


def _figures(facts: RunFacts) -> list[tuple[str, str]]:
    """What one wants to know first."""
    found: list[tuple[str, str]] = []
    metrics = {stage.record.name: stage.manifest.metrics for stage in facts.reached if stage.manifest}
    train, compare = metrics.get("train", {}), metrics.get("compare", {})
    if "num_parameters" in metrics.get("convert", {}):
        found.append(("parameters", f"{metrics['convert']['num_parameters']:,}"))
    if "bytes" in metrics.get("export", {}):
        found.append(("exported", size(metrics["export"]["bytes"])))
    if "iterations" in train:
        found.append(("iterations", f"{train['iterations']:,}"))
    for field, name in (("final_loss", "final loss"), ("best_validation_loss", "best validation loss")):
        if train.get(field) is not None:
            found.append((name, figure(train[field])))
    if train.get("tokens_per_s") is not None:
        found.append(("tokens/s", f"{train['tokens_per_s']:,.0f}"))
    for field, name in (("base_pass_rate", "base passed"), ("tuned_pass_rate", "tuned passed")):
        if compare.get(field) is not None:
            found.append((name, f"{compare[field]:.0%}"))
    return found


def _cost(facts: RunFacts) -> dict[str, Any]:
    """Device-hours by stage; in words how many of them were on GPUs, and how many this run paid for itself."""
    rows, hours = [], {(device, now): 0.0 for device in ("GPU", "CPU", "") for now in (True, False)}
    for stage in facts.reached:
        hours[stage.device, stage.is_paid_now] += stage.device_hours
        paid = "by this run" if stage.is_paid_now else "earlier"
        device = stage.device or "not recorded"
        rows.append(
            (stage.record.name, paid, device, stage.num_processes, _time(stage.made_s), f"{stage.device_hours:.4f}")
        )
    words = f"{hours['GPU', True]:.4f} GPU-hours in this run" if any(row[2] == "GPU" for row in rows) else "No GPU"
    if hours["GPU", False]:
        words += f", and {hours['GPU', False]:.4f} earlier in what it reused"
    words += f"; {hours['CPU', True]:.4f} process-hours on CPU in this run, {hours['CPU', False]:.4f} earlier"
    if hours["", True] or hours["", False]:
        words += f"; {hours['', True] + hours['', False]:.4f} on devices that no file of the stage names"
    return {"cost": rows, "cost_words": f"{words}."}


def _training(facts: RunFacts) -> dict[str, Any]:
    """Curves of what training logged, and what else it told."""
    records = facts.training
    losses = {"training": loss_points(records, "loss"), "validation": loss_points(records, "validation_loss")}
    pictures = [
        (curves("Training and validation loss", losses), "Loss by iteration; validation is dashed."),
        (curves("Speed of training", {"speed": loss_points(records, "tokens_per_s")}), "Tokens a second by iteration."),
        (curves("Gradient norm", {"gradient": loss_points(records, "grad_norm")}), "Gradient norm by iteration."),
        (curves("Learning rate", {"rate": loss_points(records, "lr")}), "Learning rate by iteration."),
    ]
    notes = [
        (record["iteration"], f"{name}: {record[name]}")
        for record in records
        for name in ("skipped", "changed")
        if name in record
    ]
    return {"training": [one for one in pictures if one[0]], "training_notes": notes}


def _lineage(facts: RunFacts) -> dict[str, Any]:
    manifests = list(facts.lineage())
    rows = [
        (
            f"{one.kind}/{one.key}",
            ", ".join(f"{role} {artifact}" for role, artifact in one.inputs.items()),
            moment(one.created),
            duration(one.duration_s),
            one.content[:SHORT],
        )
        for one in manifests
    ]
    origins: dict[tuple[str, str], None] = {}
    versions: dict[tuple[str, str], None] = {}
    for one in manifests:
        if "source" in one.ingredients:
            origins["base model", str(one.ingredients["source"])] = None
        for role, artifact in one.inputs.items():
            if artifact.startswith("local/"):
                origins[f"{role}: a local folder, by the digest of its files", artifact.partition("/")[2]] = None
        for name, value in one.ingredients.get("config", {}).items():
            if name.endswith(("dataset", "evaluate.suite")) and value:
                for digest in [value] if isinstance(value, str) else value:
                    origins[f"{name} (SHA-256)", str(digest)] = None
        for name, version in one.versions.items():
            versions["code (commit)" if name == "code" else name, version] = None
    return {"lineage": rows, "origins": list(origins), "versions": sorted(versions)}
