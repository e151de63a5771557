"""`python -m mcore.sources`: get a base model as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Source = Annotated[
    str, typer.Argument(help="A name of the catalogue, hf:org/name[@revision] or ms:org/name[@revision].")
]


@app.command()
def fetch(
    source: Source,
    output: Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")],
    expect: Annotated[
        str | None, typer.Option(metavar="IDENTITY", help="Refuse a source that is no longer this content.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Download a model and write it as a Hugging Face folder."""
    from mcore.sources.fetch import fetch as run

    typer.echo(json.dumps(run(source, output, expect=expect, overwrite=overwrite)))


@app.command()
def locate(source: Source) -> None:
    """Print a hub model's commit and config as JSON."""
    from mcore.sources.hubs import locate as run

    typer.echo(json.dumps(run(source)))


if __name__ == "__main__":
    run_as_child(app)
