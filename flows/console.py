"""A run in a terminal: each stage as it goes, base and tuned answers side by side, and where everything is."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console

from configs.schema.run import RunConfig
from mcore.artifacts import Store
from mcore.errors import ConfigError, Problem
from mcore.evaluate.comparison import read_comparison
from mcore.evaluate.report import side_by_side
from mcore.progress import say
from tasks.report import REPORT

CASES_SHOWN = 6
"""Cases of each group in the terminal; the report has all."""
RESULT = re.compile("[{╭│├╰]")
"""How lines begin that a command prints as its result, JSON or a table: these are shown in the end, not on the way."""
ERROR = re.compile(r"\w+Error: ")
SERVER_TIMEOUT_S = 10.0
CHECKOUT = Path(__file__).parents[1]


def run_in_console(run: RunConfig) -> None:
    """Run the pipeline and print what comes of it.

    Raises:
        ConfigError: There is no Prefect server where one should be.
        PipelineError: What ended the run.
    """
    # Prefect's own console shows every error three times with its traceback; our lines are shown by the handler below.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url  # from the environment or a profile
    if url is None:
        say("starting Prefect's own server")
    else:
        check_server(url)
    from flows.pipeline import pipeline

    start = time.time()
    page = Store(run.launch.store).run_dir(run.name) / REPORT
    handler = StageLines()
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        result = pipeline(run)
    except BaseException:
        if page.exists() and page.stat().st_mtime >= start:
            say(f"report: {page}")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    for outcome in result.outcomes:
        if outcome.name == "compare":
            comparison = read_comparison(Path(outcome.artifact.path))
            console = Console()
            with console.capture() as table:
                console.print(side_by_side(comparison, cases_per_group=CASES_SHOWN))
            say(table.get().rstrip("\n"), sys.stdout)
    say(f"model:  {result.model}\nreport: {page}", sys.stdout)


def check_server(url: str) -> None:
    """See whether a Prefect server answers; what it says does not matter.

    Args:
        url: Its API, `http://127.0.0.1:4200/api`.

    Raises:
        ConfigError: Nobody answers.
    """
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=SERVER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # a server that wants a key, say; Prefect itself will tell
    except (OSError, ValueError) as exc:
        reason = str(getattr(exc, "reason", exc))
        fix = "Start it (prefect server start), or unset PREFECT_API_URL: the run then brings its own."
        raise ConfigError("no Prefect server", [Problem(url, "a server that answers", reason, fix)]) from exc


class StageLines(logging.Handler):
    """Shows what our own code logs in a run: stages at the margin, what their commands say under them."""

    def __init__(self) -> None:
        super().__init__()
        self._in_error = False

    def emit(self, record: logging.LogRecord) -> None:
        """Show a line of ours. Prefect's own are in its log, and an error is shown once, when the run has ended."""
        text = record.getMessage()
        try:
            package = Path(record.pathname).relative_to(CHECKOUT).parts[0]
        except ValueError:
            return
        if package in {"flows", "tasks"}:
            self._in_error = False
            say(text)
        elif package == "mcore":
            self._in_error = self._in_error or bool(ERROR.match(text))
            if not self._in_error and not RESULT.match(text):
                say(f"    {text}")
