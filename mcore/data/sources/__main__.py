"""`python -m mcore.data.sources`: ask a hub about a data set, and get its files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child
from mcore.data.sources.names import HubDataset, hub_dataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Name = Annotated[str, typer.Argument(help="hf:org/name[@revision][:subset1/subset2][:split], or ms:….")]


@app.command()
def locate(name: Name) -> None:
    """Print a data set's commit and the files of its subsets as JSON."""
    from mcore.data.sources.clients import locate as run

    typer.echo(json.dumps(run(_dataset(name))))


@app.command()
def fetch(
    name: Name,
    commit: Annotated[str, typer.Option(help="Refuse a data set that is no longer this content.")],
    output: Annotated[Path, typer.Option(help="A folder with the list of files, as locate gave it.")],
) -> None:
    """Download a data set's files of rows."""
    from mcore.data.sources.clients import fetch as run

    run(_dataset(name), commit, output)


def _dataset(name: str) -> HubDataset:
    found = hub_dataset(name)
    if not isinstance(found, HubDataset):
        raise typer.BadParameter(found or "no data set of a hub")
    return found


if __name__ == "__main__":
    run_as_child(app)
