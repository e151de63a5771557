"""Plain tables for results on standard output: as wide as the screen, or wide enough where there is none."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

WIDTH_WITHOUT_SCREEN = 200


def plain_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without lines; the columns in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def show(table: Table, *, err: bool = False) -> None:
    """Print a table to standard output, or to standard error."""
    console = Console(highlight=False, stderr=err)
    if not console.is_terminal:
        console = Console(highlight=False, stderr=err, width=WIDTH_WITHOUT_SCREEN)
    with console.capture() as capture:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()), err=err)
