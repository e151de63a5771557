"""`mcore-flows bootstrap`: everything that a Prefect server has to have for this project."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

bootstraps = typer.Typer()


@bootstraps.command(rich_help_panel="A whole run")
def bootstrap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be changed.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Slots of the limit `gpu`, all workers together; what this machine has if not given."),
    ] = None,
    notify: Annotated[
        str | None, typer.Option(metavar="TYPE/NAME", help="Prefect block that is told when a gate says no.")
    ] = None,
    crashed_after_s: Annotated[
        float,
        typer.Option(min=90.0, help="Seconds without heartbeat after which a run has crashed; 3 heartbeats at least."),
    ] = 540.0,
) -> None:
    """Make the work pool, the limit of GPUs, the deployments of prefect.yaml, and the automations.

    What is there as it should be is not touched, so a second call changes nothing. The server is the one that
    PREFECT_API_URL names; `prefect server start` listens on this machine only.
    """
    from flows.api_server import server_client  # Prefect: more than a second that a wrong option need not wait for
    from flows.bootstrap import Wanted, bootstrap
    from flows.tables import plain_table, show

    table = plain_table("", "what", "name", "")
    changed = 0
    with server_client() as client:
        for step in bootstrap(client, Wanted(gpus, notify, crashed_after_s), dry_run=dry_run):
            changed += bool(step.changes)
            missing = step.changes == ("missing",)
            done = ("would be made" if dry_run else "made") if missing else ("would change" if dry_run else "changed")
            state = Text(done, "yellow") if step.changes else Text("is there", "green")
            notes = [*([] if missing else step.changes), *([step.note] if step.note else [])]
            table.add_row(state, step.what, Text(step.name), Text(", ".join(notes)))
    show(table)
    would = "would change" if dry_run else "changed"
    typer.echo(f"{changed} {would}" if changed else "Everything is there as it should be; nothing was changed.")
