"""Tokenise the data of a run, once, into a folder that training maps into memory.

`python -m mcore.data.prepare RUN.yaml --hf HF_DIR --output DIR`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child
from mcore.folders import refuse_existing
from mcore.progress import say
from mcore.run_file import read_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def prepare(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The whole run; its data and method count.")],
    hf: Annotated[Path, typer.Option(help="Hugging Face folder of the base: config, tokenizer, chat template.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
) -> None:
    """Tokenise, check, draw, split and report on the data of a run."""
    refuse_existing(output, overwrite=overwrite)
    run = read_run(run_file)
    from mcore.data.prepare.build import prepare as prepare_data
    from mcore.data.prepare.report import in_words

    say(in_words(prepare_data(run.data, run.train.method, hf, output)))


if __name__ == "__main__":
    run_as_child(lambda: app(standalone_mode=False))
