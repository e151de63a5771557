"""`mcore-flows dataset`: what is to be told of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcore.errors import ConfigError, Problem

dataset = typer.Typer(help="Tell a Prefect server that a data set was updated.", no_args_is_help=True)


@dataset.callback()
def _group() -> None:
    """Keep `dataset` a group although it has one command yet."""


@dataset.command()
def updated(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="The files that were written or replaced.")],
) -> None:
    """Send the event mcore-flows.dataset.updated for each file; the deployment dataset-updated then retrains.

    The event says that somebody should look. What is new is told by digests: a run that reads none of these files, or
    has seen them, is skipped.
    """
    problems = [Problem(str(file), "a file", "none") for file in files if not file.is_file()]
    if problems:
        raise ConfigError("no event was sent", problems)
    from flows.dataset_events import UPDATED, tell_updated  # Prefect: more than a second

    for file, digest in zip(files, tell_updated(files), strict=True):
        typer.echo(f"{UPDATED}: {file}, {digest[:12]}")
