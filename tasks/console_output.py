"""A run goes on when whoever reads what it prints is gone, as a worker is that was killed.

A worker reads the output of its flow runs through a pipe. The console that Prefect prints its log to ends the process
when nobody reads that any more, so the next line of the log would end a run that has lost nothing it needs.

Source: rich 15 (`Console.on_broken_pipe`), prefect 3.8.8 (`PrefectConsoleHandler`).
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console


def go_on_without_reader() -> None:
    """Have this process print to nowhere once nobody reads its output; the server and files have its log as before."""
    for handler in (*logging.getLogger().handlers, *logging.getLogger("prefect").handlers):
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.on_broken_pipe = partial(_print_to_nowhere, handler.console)  # type: ignore[method-assign]


def _print_to_nowhere(console: Console) -> None:
    console.quiet = True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
