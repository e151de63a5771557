"""`mcore-flows doctor`: what keeps this machine, its environments and its server from good work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from configs.schema.evaluate import EvaluateConfig
from configs.schema.launch import LaunchConfig
from flows.doctor import Finding
from flows.tables import plain_table, show
from mcore.errors import EXIT_FAILED

doctors = typer.Typer()
STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@doctors.command(rich_help_panel="A whole run")
def doctor(
    store: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the artifact store.")] = Path("store"),
    python: Annotated[
        Path, typer.Option(metavar="PROGRAM", help="Interpreter of the environment that vLLM is in.")
    ] = Path(EvaluateConfig.model_fields["python"].default),
    device_locks: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder in which devices are leased (launch.device_locks).")
    ] = Path(LaunchConfig.model_fields["device_locks"].default),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Look at packages, devices, the kernel, the store's disk, and Prefect's server and settings.

    What can be tried is tried: a process that runs away is caught, stacks are read, a file is replaced, numbers are
    added up between processes. That takes half a minute, and nothing stays. Status 1 if something fails; what only
    warns does not count.
    """
    areas = _areas(store, python, device_locks)
    found = {area: list(findings()) for area, findings in areas.items()}
    every = [finding for findings in found.values() for finding in findings]
    failed = sum(finding.state == "fail" for finding in every)
    if as_json:
        listed = {area: [asdict(finding) for finding in findings] for area, findings in found.items()}
        typer.echo(json.dumps({"ok": not failed, "areas": listed}, indent=2))
    else:
        table = plain_table("", "", "", "", "")
        for area, findings in found.items():
            for number, finding in enumerate(findings):
                state = Text(finding.state, STYLES[finding.state])
                table.add_row("" if number else area, state, *map(Text, (finding.subject, finding.found, finding.fix)))
        show(table)
        warned = sum(finding.state == "warn" for finding in every)
        typer.echo(f"\n{len(every)} looked at: {failed} fail, {warned} warn.")
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _areas(store: Path, python: Path, locks: Path) -> dict[str, Callable[[], Iterator[Finding]]]:
    """The areas, in the order in which they are told."""
    from flows.doctor.machine import machine_findings
    from flows.doctor.prefect_server import prefect_findings  # Prefect: more than a second that --help need not wait
    from flows.doctor.software import software_findings
    from flows.doctor.store import store_findings

    return {
        "software": lambda: software_findings(python),
        "machine": lambda: machine_findings(locks),
        "store": lambda: store_findings(store),
        "Prefect": prefect_findings,
    }
