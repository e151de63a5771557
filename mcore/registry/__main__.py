"""`python -m mcore.registry`: what needs a hub's client, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def commands() -> None:
    """Keep `push` a word of its own while it is the only command."""


@app.command()
def push(
    folder: Annotated[Path, typer.Option(help="The release, or an alias.")],
    to: Annotated[str, typer.Option(metavar="hf:ORG/NAME|ms:ORG/NAME", help="The repository.")],
) -> None:
    """Upload a release to a hub; the token is HF_TOKEN or MODELSCOPE_API_TOKEN."""
    from mcore.registry.push import push as run

    typer.echo(f"pushed: {run(folder, to)}")


if __name__ == "__main__":
    run_as_child(app)
