"""`mcore-flows prepare`: the data of a run by hand, without store and without Prefect."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml

from flows.children import run_in_terminal
from flows.cli_stages import PANEL, Output, Overwrite, local_model
from mcore.child import ERROR_FILE_VARIABLE
from mcore.folders import refuse_existing
from tasks.preflight import check_training_file

prepare_commands = typer.Typer()


@prepare_commands.command(rich_help_panel=PANEL)
def prepare(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run; its data and train.method count.")],
    output: Output,
    hf: Annotated[
        Path | None,
        typer.Option(metavar="HF_DIR", help="Folder with config and tokenizer; the run's model if not given."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="Change a field; may be repeated.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokenise a run's rows, with a report on them: DIR is what `train --data` takes."""
    refuse_existing(output, overwrite=overwrite)
    run = check_training_file(run_file, overrides or [], needs_model=hf is None)
    with tempfile.TemporaryDirectory(prefix="mcore-flows-") as folder:
        written = Path(folder) / "run.yaml"
        written.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        command = [sys.executable, "-m", "mcore.data.prepare", written, "--hf", hf or local_model(run.model.source)]
        variables = {ERROR_FILE_VARIABLE: str(Path(folder) / "error.json")}
        status = run_in_terminal([*command, "--output", output, *["--overwrite"] * overwrite], variables)
    if not status:
        typer.echo(output)
    raise typer.Exit(status)
