"""`mcore-flows status`, `logs`, `runs` and `resume`: what runs do and did, by the store alone; going on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from flows.children import go_on_in_own_session
from flows.cli_artifacts import STORE
from flows.cli_artifacts import StoreFolder as Folder
from flows.cli_plan import RUNS, AsJson
from flows.compare_runs import config_differences, figures, shown
from flows.run_logs import follow, last_lines, logs, newest
from flows.run_state import STATE_WORDS, STYLES, stage_states, where
from flows.tables import plain_table, show
from mcore.artifacts import Store
from mcore.errors import ConfigError, Problem
from mcore.runs import RunRecord, current, history, now, published, run_names
from mcore.runs import records as all_records
from mcore.wording import counted, duration, moment, seconds_between
from tasks.differences import short
from tasks.preflight import check_run
from tasks.report import REPORT

run_commands = typer.Typer()
PIPELINES = ("pipeline", "retrain")
"""Names of the flows that run the whole line."""
LINES = 40
"""Lines of a log that are shown if nothing else is said."""

Name = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


def known_run(store: Store, name: str) -> RunRecord:
    """The newest attempt of a run.

    Raises:
        ConfigError: The store has no such run, or no record of it.
    """
    record = current(store, name)
    if record is None:
        names = [one.name for one in all_records(store)]
        expected = f"one of {', '.join(names)}" if names else f"a run that was started in {store.root}"
        found = "a run without a record, of an earlier version" if name in run_names(store) else "none"
        raise ConfigError("there is no such run", [Problem(name, expected, found)])
    return record


@run_commands.command(rich_help_panel=RUNS)
def status(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Name of a run; all if not given.")] = None,
    store: Folder = STORE,
    as_json: AsJson = False,
) -> None:
    """Tell where runs are: stage by stage of one, or a line for each. Works without a server, and writes nothing."""
    opened = Store(store)
    if name is not None:
        record = known_run(opened, name)
        if as_json:
            typer.echo(json.dumps(_status_as_json(opened, record), indent=2))
        else:
            _show_status(opened, record)
        return
    found = list(all_records(opened))
    if as_json:
        typer.echo(json.dumps([_status_as_json(opened, record) for record in found], indent=2))
        return
    table = plain_table("run", "state", "started (UTC)", "for", "at", "", right=("for",))
    for record in found:
        stage, note = where(opened, record)
        table.add_row(record.name, _state(record), moment(record.started), _took(record), stage, Text(note))
    show(table)
    running = sum(record.state == "running" for record in found)
    typer.echo(f"{counted(len(found), 'run')}, {running} under way")


def _state(record: RunRecord) -> Text:
    word = STATE_WORDS[record.state]
    return Text(word, STYLES[word])


def _took(record: RunRecord) -> str:
    """How long a run took, or takes already; of one that was killed nobody knows."""
    return "" if record.state == "lost" else duration(seconds_between(record.started, record.ended))


def _status_as_json(store: Store, record: RunRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "state": record.state,
        "started": record.started,
        "ended": record.ended,
        "pid": record.pid,
        "flow": record.flow,
        "published": published(store, record.name),
        "failure": None if record.failure is None else asdict(record.failure),
        "stages": [asdict(stage) for stage in stage_states(store, record)],
    }


def _show_status(store: Store, record: RunRecord) -> None:
    took = _took(record)
    process = f", process {record.pid}" if record.state == "running" else ""
    started = f"started {moment(record.started)} UTC"
    typer.echo(f"{record.name}: {STATE_WORDS[record.state]}, {started}{f', {took}' if took else ''}{process}\n")
    table = plain_table("stage", "state", "took", "artifact", "", right=("took",))
    for stage in stage_states(store, record):
        seconds = "" if stage.seconds is None else duration(stage.seconds)
        kind, _, key = stage.artifact.partition("/")
        table.add_row(
            stage.name, Text(stage.state, STYLES.get(stage.state, "")), seconds, f"{kind}/{key[:8]}", Text(stage.note)
        )
    show(table)
    typer.echo("")
    for line in _advice(store, record):
        typer.echo(line)


def _advice(store: Store, record: RunRecord) -> list[str]:
    """Where to look, and what to do next."""
    lines = []
    model = published(store, record.name)
    if model is not None:
        old = "" if record.state == "done" else " (of an earlier attempt)"
        lines.append(f"model:  {store.run_dir(record.name) / 'model'}{old}")
    page = store.run_dir(record.name) / REPORT
    if page.is_file() and record.state != "running":
        lines.append(f"report: {page}")
    if record.state == "running":
        lines.append(f"To watch it: mcore-flows logs {record.name} --follow")
    elif record.state in {"stopped", "lost", "cancelled", "failed"}:
        lines.append(f"To go on: mcore-flows resume {record.name}")
    return lines


@run_commands.command("logs", rich_help_panel=RUNS)
def show_logs(
    name: Name,
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="A stage; the one that wrote last if not given.")
    ] = None,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come, until the run ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines to start with; 0 for all.")] = LINES,
    store: Folder = STORE,
) -> None:
    """Print what a stage's commands wrote. Without STAGE, --follow goes on from stage to stage."""
    opened = Store(store)
    record = known_run(opened, name)
    stages = [one.name for one in record.stages]
    if stage is not None and stage not in stages:
        raise ConfigError("the run has no such stage", [Problem(stage, f"one of {', '.join(stages)}", "none of them")])
    number = lines or None
    if following:
        shown_stage = stage
        for at, line in follow(opened, record, stage, number):
            if at != shown_stage:
                typer.echo(f"── {at}", err=True)
                shown_stage = at
            typer.echo(line)
        return
    found = logs(opened, record)
    at_stage = stage or newest(found)
    if at_stage is None or at_stage not in found:
        what = f"a log of {stage}" if stage is not None else "a log of a stage"
        those = ", ".join(found) or "none; what is reused writes no log"
        raise ConfigError("there is no such log", [Problem(str(opened.run_dir(name)), what, those)])
    if stage is None:
        typer.echo(f"── {at_stage}", err=True)
    for line in last_lines(found[at_stage], number):
        typer.echo(line)


@run_commands.command(rich_help_panel=RUNS)
def resume(
    name: Name,
    store: Folder = STORE,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Make this stage and all behind it again.")
    ] = None,
) -> None:
    """Go on with a run by its name: with the settings of its newest attempt, from the folder that it was started in.

    What is whole in the store is reused, and training goes on from its newest complete checkpoint. With --from a stage
    and all behind it are made again although the store has them; what is there stays, and what the run has published
    stays published until the new model has passed every gate.
    """
    opened = Store(store)
    record = known_run(opened, name)
    problems = []
    if record.state == "running":
        fix = f"Watch it (mcore-flows logs {name} --follow), or end it first."
        problems.append(Problem(name, "a run that has ended", f"process {record.pid} at it", fix))
    if record.flow not in PIPELINES:
        problems.append(Problem(name, f"a run of the flow {PIPELINES[0]}", record.flow, "Start that flow again."))
    if not Path(record.folder).is_dir():
        problems.append(Problem(record.folder, "the folder that the run was started in", "none"))
    stages = [stage.name for stage in record.stages]
    if from_stage is not None and from_stage not in stages:
        problems.append(Problem(f"--from {from_stage}", f"a stage of the run: one of {', '.join(stages)}", "none"))
    if problems:
        raise ConfigError("the run can't be resumed", problems)
    os.chdir(record.folder)
    launch = {**record.config["launch"], "store": str(opened.root)}
    if from_stage is not None:
        launch["again"] = {**launch.get("again", {}), from_stage: now()}
    checked = check_run({**record.config, "launch": launch}, here=True)
    go_on_in_own_session()
    from flows.console import run_in_console  # Prefect: more than a second that no other command need wait for

    run_in_console(checked.run)


@run_commands.command(rich_help_panel=RUNS)
def runs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]…", help="One: its attempts. Several: they are compared.")
    ] = None,
    store: Folder = STORE,
    as_json: AsJson = False,
) -> None:
    """List all runs, the attempts of one, or compare several: what they came to, and which settings are other."""
    opened = Store(store)
    if names and len(names) > 1:
        _compare(opened, [known_run(opened, name) for name in dict.fromkeys(names)], as_json=as_json)
        return
    if names:
        known_run(opened, names[0])
        found = history(opened, names[0])
    else:
        found = list(all_records(opened))
    if as_json:
        rows = [
            {"name": one.name, "state": one.state, "started": one.started, "ended": one.ended, "config": one.config,
             "figures": figures(opened, one)}
            for one in found
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2))
        return
    kept = [label for label in LISTED if any(label in figures(opened, one) for one in found)]
    table = plain_table("run", "state", "started (UTC)", "took", "base model", *kept, right=("took", *kept))
    for record in found:
        came_to = figures(opened, record)
        cells = [shown(came_to.get(label)) for label in kept]
        source = short(record.config.get("model", {}).get("source"))
        table.add_row(record.name, _state(record), moment(record.started), _took(record), Text(source), *cells)
    show(table)
    typer.echo(counted(len(found), "attempt" if names else "run"))


LISTED = ("iterations", "final loss", "best validation loss", "pass rate of base", "pass rate of tuned")
"""Figures in the list of runs; a comparison has all."""


def _compare(store: Store, records: list[RunRecord], *, as_json: bool) -> None:
    came_to = [figures(store, record) for record in records]
    others = config_differences(records)
    if as_json:
        whole = {
            "runs": [record.name for record in records],
            "states": [record.state for record in records],
            "figures": {name: [one.get(name) for one in came_to] for one in came_to for name in one},
            "config": others,
        }
        typer.echo(json.dumps(whole, indent=2))
        return
    names = [record.name for record in records]
    table = plain_table("", *names, right=tuple(names))
    table.add_row("state", *(_state(record) for record in records))
    table.add_row("took", *(_took(record) for record in records))
    for name in dict.fromkeys(name for one in came_to for name in one):
        table.add_row(name, *(shown(one.get(name)) for one in came_to))
    show(table)
    typer.echo("")
    if not others:
        typer.echo("Their settings are the same.")
        return
    table = plain_table("setting", *names)
    for name, values in others.items():
        table.add_row(name, *(Text(short(value)) for value in values))
    show(table)
