"""`mcore-flows from-swift`: a run file of a Megatron-SWIFT command, and what it could not carry over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from flows.from_swift.command import read_command
from flows.from_swift.draft import Finding, Outcome
from flows.from_swift.run_file import run_file
from flows.from_swift.table import EFFECTS
from flows.from_swift.translate import translate
from flows.tables import plain_table, show
from mcore.errors import ConfigError, Problem
from mcore.folders import refuse_no_place, write_durably

EXIT_INCOMPLETE = 4
"""The run file is valid, but does not mean all that the command meant."""

TITLES: dict[Outcome, tuple[str, str]] = {
    "carried": ("Carried over", "green"),
    "changed": ("Carried over under another name, or with another meaning", "green"),
    "default": ("Not given; Megatron-SWIFT's default is not ours, so it is written out", "green"),
    "left out": ("Left out", "yellow"),
    "to do": ("For you to do", "red"),
    "unknown": ("Unknown, left out", "red"),
}

translation = typer.Typer()


@translation.command("from-swift", rich_help_panel="A whole run")
def from_swift(
    given: Annotated[
        str,
        typer.Argument(
            metavar="COMMAND",
            help="A quoted `megatron pt …` or `megatron sft …` with the variables in front of it, a script that holds "
            "one, or a YAML file of its arguments.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the run file here; to standard output if not given.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; that of its output_dir or model if unset.")] = None,
    method: Annotated[
        Literal["pt", "sft"] | None, typer.Option(help="What a YAML file is for, which does not say it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace an existing file.")] = False,
) -> None:
    """Make a run file of a Megatron-SWIFT command, and tell what became of each argument.

    Exit status: 0 the run means what the command meant; 4 something that changes what is learnt was left out, or is
    yours to do (the file is made all the same); 2 no run can be made of it.
    """
    if output is not None and output.exists() and (not overwrite or output.is_dir()):
        fix = "Name another --output" + ("." if output.is_dir() else ", or pass --overwrite to replace it.")
        found = "a folder" if output.is_dir() else "one"
        raise ConfigError("the run file is in the way", [Problem(str(output), "no such file", found, fix)])
    if output is not None:
        refuse_no_place(output)
    done = translate(read_command(given, method), name)
    text = run_file(done)
    show_findings(done.findings)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_durably(output, text)
        typer.echo(output)
    if done.needs_a_look:
        typer.echo(f"{done.needs_a_look} of the above change what is learnt and need your hand.", err=True)
        raise typer.Exit(EXIT_INCOMPLETE)


def show_findings(findings: Sequence[Finding]) -> None:
    """Print to standard error what became of each argument, by outcome."""
    for outcome, (title, style) in TITLES.items():
        found = [finding for finding in findings if finding.outcome == outcome]
        if not found:
            continue
        typer.secho(f"{title}:", fg=style, bold=True, err=True)
        last = "it changes" if outcome == "left out" else "field"
        table = plain_table("  argument", "value", last, "note")
        for finding in found:
            where = EFFECTS[finding.effect] if outcome == "left out" else finding.where
            is_bad = outcome == "left out" and finding.needs_a_look
            table.add_row(f"  {finding.argument}", Text(finding.value), Text(where, "red" * is_bad), Text(finding.note))
        show(table, err=True)
        typer.echo("", err=True)
