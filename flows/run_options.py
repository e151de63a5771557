"""Arguments that commands on a run file have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run, such as those in configs/runs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Change a field of the run; may be repeated."),
]
StoreFolder = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="Folder of the artifact store (launch.store).")
]


def all_overrides(given: list[str] | None, store: str | None) -> list[str]:
    """What `--set` and `--store` change of a run."""
    return [*(given or []), *([f"launch.store={json.dumps(store)}"] if store is not None else [])]
