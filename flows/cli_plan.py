"""`mcore-flows plan` and `explain`: what a run would do, why, and what that takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from flows.estimates import Estimate
from flows.nearest import Earlier, Nearest
from flows.plan import Decision, decide, edges, totals
from flows.plan_memory import memory_as_json, memory_table, training_memory
from flows.run_options import Overrides, RunFile, StoreFolder, all_overrides
from flows.tables import plain_table, show
from mcore.errors import ConfigError, Problem
from mcore.runs import is_under_way
from mcore.wording import counted, duration, moment, size
from tasks.differences import short
from tasks.graph import StagePlan
from tasks.preflight import CheckedRun, check_run_file

plans = typer.Typer()
RUNS = "A whole run"
STYLES = {"REUSE": "green", "RUN": "yellow", "BLOCKED": "red"}
FILLS = {"REUSE": "#d5f0d5", "RUN": "#fdf1c7", "BLOCKED": "#f8d4d4"}
"""Colours of the boxes in a drawing; the word is in each box as well."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@plans.command(rich_help_panel=RUNS)
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a drawing of the stages in Mermaid.")] = False,
) -> None:
    """Tell what a run would do: which stages run, which are reused, why, how long and how much room that takes.

    Starts and makes nothing. BLOCKED is what lies behind a gate that has said no to just this. Times and sizes are
    those of the most similar artifact in the store, training scaled by its samples. Memory is an estimate, in GiB a
    process of each pipeline stage.
    """
    if as_json and mermaid:
        raise ConfigError("the plan has one form", [Problem("--json, --mermaid", "one of them", "both")])
    checked = check_run_file(run_file, all_overrides(overrides, store), ask_source=False)
    decisions = decide(checked)
    if as_json:
        typer.echo(json.dumps(plan_as_json(checked, decisions), indent=2))
    elif mermaid:
        typer.echo(drawing(decisions))
    else:
        _show_plan(checked, decisions)


def _show_plan(checked: CheckedRun, decisions: list[Decision]) -> None:
    has_estimates = any(decision.estimate is not None for decision in decisions)
    figures = ("takes", "room") if has_estimates else ()
    table = plain_table("stage", "does", *figures, "why", right=figures)
    for decision in decisions:
        known = decision.estimate
        cells = ["", ""] if known is None else [f"≈ {duration(known.seconds)}", f"≈ {size(known.num_bytes)}"]
        does = Text(decision.action, STYLES[decision.action])
        table.add_row(decision.stage.name, does, *(cells if has_estimates else []), Text(decision.why))
    show(table)
    if (memory := training_memory(checked)) is not None:
        table, text = memory_table(memory)
        typer.echo("")
        show(table)
        typer.echo(f"{text}\n")
    if is_under_way(checked.store, checked.run.name):
        typer.echo(f"A run named {checked.run.name} is under way; another one would wait for it.")
    num = {action: sum(decision.action == action for decision in decisions) for action in STYLES}
    if num["REUSE"] < len(decisions):
        typer.echo(_takes(checked, decisions))
    blocked = f", {num['BLOCKED']} are blocked" if num["BLOCKED"] else ""
    typer.echo(f"{num['RUN']} of {len(decisions)} stages run, {num['REUSE']} are reused{blocked}.")


def _takes(checked: CheckedRun, decisions: list[Decision]) -> str:
    seconds, num_bytes, unknown = totals(decisions)
    free = size(shutil.disk_usage(_existing(checked.store.root)).free)
    if len(unknown) == sum(decision.action != "REUSE" for decision in decisions):
        return f"Nothing like it was made before, so time and room can't be told; {free} are free."
    rest = f", without {', '.join(unknown)}" if unknown else ""
    return f"It takes about {duration(seconds)} and {size(num_bytes)}{rest}; {free} are free."


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def plan_as_json(checked: CheckedRun, decisions: list[Decision]) -> dict[str, Any]:
    """The plan as `--json` prints it; times in seconds, room in bytes."""
    seconds, num_bytes, unknown = totals(decisions)
    return {
        "name": checked.run.name,
        "store": str(checked.store.root),
        "under_way": is_under_way(checked.store, checked.run.name),
        "stages": [
            {
                "name": decision.stage.name,
                "action": decision.action,
                "why": decision.why,
                "artifact": decision.stage.artifact,
                "inputs": dict(decision.stage.inputs),
                "nearest": None if decision.nearest is None else _nearest_as_json(decision.nearest),
                "estimate": _estimate_as_json(decision.estimate),
            }
            for decision in decisions
        ],
        "memory": memory_as_json(training_memory(checked)),
        "seconds": seconds,
        "bytes": num_bytes,
        "without_estimate": unknown,
        "free_bytes": shutil.disk_usage(_existing(checked.store.root)).free,
    }


def _nearest_as_json(nearest: Nearest) -> dict[str, Any]:
    return {
        "artifact": nearest.artifact,
        "created": nearest.manifest.created,
        "differences": [
            {"what": one.what, "before": one.before, "now": one.now, "is_input": one.is_input}
            for one in nearest.differences
        ],
    }


def _estimate_as_json(known: Estimate | None) -> dict[str, Any] | None:
    return None if known is None else {"seconds": known.seconds, "bytes": known.num_bytes, "from": known.source}


def drawing(decisions: list[Decision]) -> str:
    """The plan as a Mermaid flowchart."""
    lines = ["flowchart LR"]
    for decision in decisions:
        takes = "" if decision.estimate is None else f", ≈ {duration(decision.estimate.seconds)}"
        is_gate = decision.stage.kind in {"verify", "compare"}
        left, right = ("{{", "}}") if is_gate else ("[", "]")
        lines.append(f'    {decision.stage.name}{left}"{decision.stage.name}<br>{decision.action}{takes}"{right}')
    lines += [f"    {source} --> {target}" for source, target in edges(decisions)]
    for action, fill in FILLS.items():
        if names := [decision.stage.name for decision in decisions if decision.action == action]:
            lines += [f"    classDef {action} fill:{fill},color:#000", f"    class {','.join(names)} {action}"]
    return "\n".join(lines)


@plans.command(rich_help_panel=RUNS)
def explain(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage, as `plan` names them.")],
    run_file: RunFile,
    overrides: Overrides = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Tell what goes into a stage's key, and what is other in the earlier artifact that is most like it.

    Starts and makes nothing.
    """
    checked = check_run_file(run_file, all_overrides(overrides, store), ask_source=False)
    decision = next((one for one in decide(checked) if one.stage.name == stage), None)
    if decision is None:
        names = ", ".join(one.name for one in checked.stages)
        raise ConfigError("the run has no such stage", [Problem(stage, f"one of {names}", "none of them")])
    planned = decision.stage
    nearest = Earlier(checked).nearest(planned, but=planned.artifact)  # of what is there, too: the one beside it
    if as_json:
        typer.echo(json.dumps(_explanation(decision, nearest), indent=2))
        return
    typer.echo(f"{planned.artifact}\n{decision.action}: {decision.why}\n")
    _show_ingredients(planned, nearest)
    typer.echo("")
    if nearest is None:
        typer.echo("The store has no other artifact of this stage.")
        return
    made = f"{moment(nearest.manifest.created)} UTC in {duration(nearest.manifest.duration_s)}"
    typer.echo(
        f"Most like it: {nearest.artifact}, made {made}, with {counted(len(nearest.differences), 'other ingredient')}."
    )


def _explanation(decision: Decision, nearest: Nearest | None) -> dict[str, Any]:
    planned = decision.stage
    return {
        "artifact": planned.artifact,
        "action": decision.action,
        "why": decision.why,
        "ingredients": planned.ingredients,
        "proofs": {role: name for role, name in planned.inputs.items() if name not in _inputs(planned).values()},
        "nearest": None if nearest is None else _nearest_as_json(nearest),
    }


def _inputs(planned: StagePlan) -> dict[str, str]:
    return dict(planned.ingredients["inputs"])


def _show_ingredients(planned: StagePlan, nearest: Nearest | None) -> None:
    """Every ingredient with its value; where the nearest artifact has another, that stands beside it."""
    others = {} if nearest is None else {one.what: one for one in nearest.differences if not one.is_input}
    table = plain_table("ingredient", "now", *(["in the nearest"] if nearest is not None else []))

    def add(name: str, value: str, other: str | None, same: str = "same") -> None:
        cell = Text(same, "dim") if other is None else Text(other, "yellow")
        table.add_row(Text(name, "" if other is None else "bold"), Text(value), *([cell] if nearest else []))

    rows: dict[str, Any] = {"version": planned.ingredients["version"]}
    if "source" in planned.ingredients:
        rows["model.source"] = planned.ingredients["source"]
    if "again" in planned.ingredients:
        rows["again"] = planned.ingredients["again"]
    rows |= planned.ingredients["config"]
    for name in [*rows, *(name for name in others if name not in rows)]:
        add(name, short(rows.get(name)), short(others[name].before) if name in others else None)
    before = {} if nearest is None else nearest.manifest.ingredients.get("inputs", {})
    for role, artifact in _inputs(planned).items():
        add(f"input {role}", artifact, None if before.get(role) == artifact else short(before.get(role)))
    for role, artifact in planned.inputs.items():
        if role not in _inputs(planned):  # it must stand, and changes nothing of what comes out
            add(f"proof {role}", artifact, None, "not in the key")
    show(table)
