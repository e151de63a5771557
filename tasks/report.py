"""The one page of a run: its stages, loss curve, base against tuned, proofs and lineage, also if it failed half way.

`<store>/runs/<name>/report.md` holds it, with the curve in `loss.svg` beside it; Prefect shows the same page as an
artifact. Everything in it comes from the store, so it says what is there, not what was planned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore.artifacts import Manifest
from mcore.errors import CheckpointError, PipelineError, StoppedError
from mcore.folders import write_durably
from mcore.metrics import FILE_NAME as METRICS_FILE
from mcore.metrics import read_metrics
from mcore.select import select_checkpoint
from mcore.wording import duration, size
from tasks.loss_curve import data_uri, loss_curve, loss_points

if TYPE_CHECKING:
    from tasks.stage import Outcome, PlannedRun

REPORT = "report.md"
HTML_PAGE = "report.html"
"""Written once the run is on record as ended (`tasks/run_page`)."""
CURVE = "loss.svg"
GO_ON = "Run the same command again to go on."
FIGURES = {
    "samples": "{:,} samples",
    "trained_tokens": "{:,} trained tokens",
    "num_parameters": "{:,} parameters",
    "num_differing_tensors": "{} tensors differ",
    "relative_error": "error {:.1e}",
    "iterations": "{:,} iterations",
    "final_loss": "loss {:.4f}",
    "iteration": "iteration {:,}",
    "reason": "{}",
    "base_pass_rate": "base {:.0%}",
    "tuned_pass_rate": "tuned {:.0%}",
    "pass_rate": "{:.0%} passed",
    "perplexity": "perplexity {:.4g}",
    "num_failed_gates": "{} gates failed",
    "bytes": "{}",
}
"""Figures of a stage that the table shows, in this order and these words; its manifest has all."""
FIGURES_SHOWN = 2
"""So many of them: a page has room for no more."""


@contextmanager
def reported(planned: PlannedRun) -> Iterator[None]:
    """Write the run's report when the block ends, however it ends; a failure is in it and goes on its way.

    Raises:
        StoppedError: Ctrl-C came; says what is saved.
    """
    try:
        yield
    except KeyboardInterrupt as exc:
        stopped = _stopped(planned)
        _tell(planned, stopped)
        raise stopped from exc
    except BaseException as exc:
        _tell(planned, exc)
        raise
    _tell(planned)


def _stopped(planned: PlannedRun) -> StoppedError:
    name = _unfinished(planned)
    if name is None:
        return StoppedError("stopped", [GO_ON])
    saved = ""
    if name == "train":
        plan = planned.plans[name]
        try:
            iteration = select_checkpoint(planned.store.partial(plan.kind, plan.key)).iteration
            saved = f": iteration {iteration} is saved"
        except CheckpointError:
            saved = " before anything was saved"
    return StoppedError(f"stopped at {name}{saved}", [GO_ON])


def _unfinished(planned: PlannedRun) -> str | None:
    """The first stage that has no artifact yet."""
    done = {outcome.name for outcome in planned.outcomes}
    return next((name for name in planned.plans if name not in done), None)


def _tell(planned: PlannedRun, error: BaseException | None = None) -> None:
    """Write the page and show it. What goes wrong with that neither fails a run nor hides what failed it."""
    try:
        write_report(planned, error)
    except Exception as exc:
        _warn("the report can't be written", exc)
    if error is None or isinstance(error, Exception):  # a run that is being cancelled has no time for the server
        try:
            _show(planned, error)
        except Exception as exc:
            _warn("the report can't be shown in Prefect", exc)


def _warn(what: str, exc: Exception) -> None:
    from prefect import get_run_logger

    get_run_logger().warning("%s: %s", what, f"{type(exc).__name__}: {exc}")


def write_report(planned: PlannedRun, error: BaseException | None = None) -> Path:
    """Write the page and the curve into the run's folder.

    Args:
        planned: The run, with what became of its stages.
        error: What ended it, if it failed.

    Returns:
        The page.
    """
    folder = planned.store.run_dir(planned.run.name)
    folder.mkdir(parents=True, exist_ok=True)
    curve = _curve(planned)
    if curve is not None:
        write_durably(folder / CURVE, curve)
    page = folder / REPORT
    write_durably(page, report_page(planned, CURVE if curve else None, error))
    return page


def _show(planned: PlannedRun, error: BaseException | None = None) -> None:
    """Make the page a Prefect artifact."""
    from prefect.artifacts import create_markdown_artifact

    curve = _curve(planned)
    page = report_page(planned, data_uri(curve) if curve else None, error)
    create_markdown_artifact(page, key=artifact_key(planned.run.name), description=f"Run {planned.run.name}")


def artifact_key(run_name: str) -> str:
    """Key of a run's page in Prefect, which takes lowercase letters, digits and dashes only."""
    return f"report-{re.sub('[^a-z0-9]+', '-', run_name.lower()).strip('-')}"


def report_page(planned: PlannedRun, curve: str | None, error: BaseException | None = None) -> str:
    """The page as Markdown.

    Args:
        planned: The run, with what became of its stages.
        curve: Link target of the loss curve.
        error: What ended the run, if it failed.
    """
    done = {outcome.name: outcome for outcome in planned.outcomes}
    failed = _unfinished(planned) if error is not None else None
    # A cancelled flow run ends with an exception that is no error.
    ended = "stopped" if isinstance(error, StoppedError) or not isinstance(error, Exception) else "failed"
    state = "done" if error is None else f"{ended} at {failed}" if failed else ended
    seconds = sum(outcome.seconds for outcome in planned.outcomes)
    lines = [
        f"# {planned.run.name}: {state}",
        "",
        f"{datetime.now(UTC).isoformat(sep=' ', timespec='seconds')[:19]} UTC, {duration(seconds)}, "
        f"base model `{planned.run.model.source}`.",
        "",
        f"All of it on one page: `{planned.store.run_dir(planned.run.name) / HTML_PAGE}`",
        "",
    ]
    if error is not None:
        lines += [
            f"## {'What went wrong' if ended == 'failed' else 'Stopped'}",
            "",
            "```",
            str(error) or type(error).__name__,
            "```",
            "",
        ]
        if failed is not None and not isinstance(error, PipelineError):
            lines += [f"Log: `{planned.stage_dir(failed)}`", ""]
    lines += ["## Stages", "", *_stage_table(planned, done, failed, ended), ""]
    lines += _training(planned, curve)
    lines += _page_of("compare", "comparison.md", planned, done)
    lines += _proofs(done)
    for name in ("verify_convert", "verify_export"):
        if name == failed:
            lines += _page_of(name, "report.md", planned, done)
    lines += _lineage(planned, done)
    return "\n".join(lines).rstrip() + "\n"


def _stage_table(planned: PlannedRun, done: Mapping[str, Outcome], failed: str | None, ended: str) -> list[str]:
    lines = ["| stage | state | time | figures | artifact |", "| --- | --- | ---: | --- | --- |"]
    for name, plan in planned.plans.items():
        outcome = done.get(name)
        state = ended if name == failed else "not reached"
        time, figures = "", ""
        if outcome is not None:
            state = "cached" if outcome.cached else "made"
            time, figures = _time(planned, outcome), _figures(outcome.artifact.metrics)
        lines.append(f"| {name} | {state} | {time} | {figures} | `{plan.key[:8]}` |")
    return lines


def _time(planned: PlannedRun, outcome: Outcome) -> str:
    """How long a stage took: in this run, or when what it reused was made."""
    if not outcome.cached:
        return duration(outcome.seconds)
    try:
        made = Manifest.read(planned.store.path(outcome.artifact.kind, outcome.artifact.key))
    except (OSError, ValueError):
        return ""  # deleted since
    return f"made in {duration(made.duration_s)}"


def _figures(metrics: Mapping[str, Any]) -> str:
    """The first few that matter, such as `90,624 parameters, 427 kB`."""
    shown = []
    for name, text in FIGURES.items():
        value = metrics.get(name)
        if value is not None:
            shown.append(text.format(size(value) if name == "bytes" else value))
    return ", ".join(shown[:FIGURES_SHOWN]).replace("|", "\\|")


def _records(planned: PlannedRun) -> list[dict[str, Any]]:
    """What training logged: all of it, or what there is so far if it was not finished."""
    plan = planned.plans.get("train")
    if plan is None:
        return []
    is_done = any(outcome.name == plan.name for outcome in planned.outcomes)
    folder = planned.store.path(plan.kind, plan.key) if is_done else planned.store.partial(plan.kind, plan.key)
    return read_metrics(folder / METRICS_FILE)


def _curve(planned: PlannedRun) -> str | None:
    records = _records(planned)
    return loss_curve(loss_points(records, "loss"), loss_points(records, "validation_loss"))


def _training(planned: PlannedRun, curve: str | None) -> list[str]:
    records = _records(planned)
    steps = [record for record in records if "loss" in record]
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    lines = ["## Training", "", f"* {last['iteration']} iterations, loss {first['loss']:.4f} to {last['loss']:.4f}"]
    validated = loss_points(records, "validation_loss")
    if validated:
        iteration, best = min(validated, key=lambda point: point[1])
        lines.append(f"* lowest validation loss {best:.4f} at iteration {iteration}")
    speeds = sorted(record["tokens_per_s"] for record in steps if record.get("tokens_per_s"))
    if speeds:
        lines.append(f"* {speeds[len(speeds) // 2]:,.0f} tokens/s (median step)")
    return [*lines, "", *([f"![training and validation loss]({curve})", ""] if curve else [])]


def _page_of(name: str, file: str, planned: PlannedRun, done: Mapping[str, Outcome]) -> list[str]:
    """A page that a stage wrote, its headings a level lower; what a failed gate wrote is in the run's folder."""
    if name not in planned.plans:
        return []
    folder = Path(done[name].artifact.path) if name in done else planned.stage_dir(name)
    try:
        lines = (folder / file).read_text().splitlines()
    except OSError:
        return []
    return [*(f"#{line}" if line.startswith("#") else line for line in lines), ""]


def _proofs(done: Mapping[str, Outcome]) -> list[str]:
    rows = [
        f"| {name} | {_figure(metrics, 'num_tensors')} | {_figure(metrics, 'num_differing_tensors')} "
        f"| {_figure(metrics, 'relative_error')} | {_figure(metrics, 'max_relative_error')} "
        f"| {_figure(metrics, 'top1_agreement')} |"
        for name, metrics in ((name, done[name].artifact.metrics) for name in done if name.startswith("verify"))
    ]
    header = [
        "## Proofs",
        "",
        "| proof | tensors | differing bits | error of logits | gate | same top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return [*header, *rows, ""] if rows else []


def _figure(metrics: Mapping[str, Any], name: str) -> str:
    value = metrics.get(name, "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _lineage(planned: PlannedRun, done: Mapping[str, Outcome]) -> list[str]:
    """From the exported model, or whatever is the last there is, back to where everything came from."""
    last = done.get("export") or (list(done.values())[-1] if done else None)
    if last is None:
        return []
    manifests = list(planned.store.lineage(f"{last.artifact.kind}/{last.artifact.key}"))
    lines = ["## Lineage", "", "| artifact | made from | made | by |", "| --- | --- | --- | --- |"]
    for manifest in manifests:
        inputs = [f"{role} `{_brief(artifact)}`" for role, artifact in manifest.inputs.items()]
        by = ", ".join(f"{name} {version[:12]}" for name, version in manifest.versions.items() if name in _TOLD)
        lines.append(
            f"| `{_brief(f'{manifest.kind}/{manifest.key}')}` | {', '.join(inputs + _origins(manifest))} "
            f"| {manifest.created[:16].replace('T', ' ')} | {by} |"
        )
    return [*lines, ""]


_TOLD = ("code", "torch", "megatron-core", "transformers")


def _brief(artifact: str) -> str:
    kind, _, key = artifact.partition("/")
    return f"{kind}/{key[:8]}"


def _origins(manifest: Manifest) -> list[str]:
    """What an artifact was made from that is no artifact: a model's source, data files by their digests."""
    origins = [str(manifest.ingredients["source"])] if "source" in manifest.ingredients else []
    for name in ("data.dataset", "data.val_dataset"):
        digests = [str(digest)[:12] for digest in manifest.ingredients.get("config", {}).get(name) or ()]
        origins += [f"{name} {', '.join(digests)}"] if digests else []
    return origins
