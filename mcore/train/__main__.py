"""Train a model, or go on with a run that was interrupted.

    torchrun --nproc_per_node 2 -m mcore.train RUN.yaml --base DIR --output DIR [--data DIR]
    python -m mcore.train RUN.yaml --base DIR --output DIR          (one process)

A rank's exit status is 0 when the run is complete, 1 when it failed, 2 when its input is wrong, and 75 when it was
asked to stop (SIGTERM, SIGINT): it then finished its step, saved, and goes on when the same command is run again.
torchrun ends with 1 whatever its ranks say. What happened is therefore told by the error file as well
(`mcore/child.py`): status 75 is a `StoppedError`, and a parent that reads the file after any status but 0 needs nothing
else.

Under torchrun SIGTERM may go to the ranks, to torchrun, or to both. torchrun hands it on and kills ranks that are still
there after 30 s; where a step and a save take longer, set TORCH_ELASTIC_SHUTDOWN_TIMEOUT (seconds) for it, or start
`mcore.train.torchrun` in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child
from mcore.run_file import read_run
from mcore.train.stop import stop_on_signals

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The whole run.")],
    base: Annotated[Path, typer.Option(help="Checkpoint folder to start from, with release/ and hf/.")],
    output: Annotated[Path, typer.Option(help="The run's folder; resumed if it holds checkpoints.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder that mcore.data.prepare made; made as OUTPUT-data if not given.")
    ] = None,
) -> None:
    """Train until the last step, resuming from the newest complete checkpoint in OUTPUT."""
    run = read_run(run_file)
    with stop_on_signals() as stop:  # from here on, as the imports take seconds
        # Not at the top: every process that megatron-core forks or spawns would import torch again.
        from mcore.backend import parallel
        from mcore.train.run import train as train_run

        train_run(run, base, output, stop, data=data)
        parallel.stop()


if __name__ == "__main__":
    run_as_child(lambda: app(standalone_mode=False))
