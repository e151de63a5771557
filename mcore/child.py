"""What every stage process shares: errors become a JSON file and an exit status, and nothing phones home.

A stage is an ordinary command (`python -m mcore.bridge convert …`) that can be run by hand. Started by
`mcore/launch.py`, it finds the path for its error document in `MCORE_FLOWS_ERROR_FILE`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mcore.errors import PipelineError
from mcore.redact import redacted
from mcore.supervise.processes import PR_SET_PDEATHSIG, PR_SET_PTRACER, PR_SET_PTRACER_ANY, prctl

ERROR_FILE_VARIABLE = "MCORE_FLOWS_ERROR_FILE"

QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Switches off the telemetry of Prefect, vLLM and the hubs' clients. None of these changes a result."""

QUIET_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
)
"""How the warnings begin that megatron-core and torch give at every start, whatever the work is."""


def run_as_child(main: Callable[[], object]) -> None:
    """Call `main`, then end this process with the exit status of what happened.

    A `PipelineError` is printed without a traceback (its text is written for people), any other exception with one.
    Both are written to the error file if the parent asked for one. A status that `main` returns is taken: so typer
    tells of Ctrl-C (130) if it was not to end the process itself.
    """
    os.environ.update(QUIET_ENVIRONMENT)
    _leave_out_usual_warnings()
    if ERROR_FILE_VARIABLE in os.environ:
        # Who watches may look where this stands still, and it does not outlive who started it: torchrun and its
        # supervisor may both be killed, and a rank that has all its peers would go on for ever.
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        status = main()
    except PipelineError as error:
        if _tell_parent(error):
            sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        _leave(error)
    except Exception as exc:  # the one broad except of a stage: nothing may leave without an error document
        traceback.print_exc()
        defect = PipelineError(
            f"unexpected {type(exc).__name__}: {exc}", ["this is a defect; the log has the traceback"]
        )
        _tell_parent(defect)
        _leave(defect)
    if isinstance(status, int) and status:
        raise SystemExit(status)


def _leave_out_usual_warnings() -> None:
    """Here and in the processes that this one starts: `QUIET_WARNINGS`, and what libraries tell those who write against
    them (FutureWarning). All others are shown; so are these if PYTHONWARNINGS or Python's -W says anything.
    """
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore", FutureWarning)
    for text in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", re.escape(text))
    options = ["ignore::FutureWarning", *(f"ignore:{text}" for text in QUIET_WARNINGS)]
    os.environ["PYTHONWARNINGS"] = ",".join(options)


def _tell_parent(error: PipelineError) -> bool:
    """Write the error document; False if another process has said just this already.

    Under torchrun the first rank to fail speaks for all; the others usually fail because of it.
    """
    error_file = os.environ.get(ERROR_FILE_VARIABLE)
    if not error_file:
        return True
    temporary = Path(f"{error_file}.{os.getpid()}")
    document = json.loads(redacted(error.to_json()))
    rank = os.environ.get("RANK", "")
    try:
        temporary.write_text(json.dumps(document | ({"rank": int(rank)} if rank.isdigit() else {}), indent=2))
        try:
            Path(error_file).hardlink_to(temporary)
        except FileExistsError:
            told = json.loads(Path(error_file).read_text())
            return any(told.get(name) != value for name, value in document.items())
        finally:
            temporary.unlink()
    except (OSError, ValueError) as exc:  # the exit status still tells
        sys.stderr.write(f"{error_file} can't be written: {exc}\n")
    return True


def _leave(error: PipelineError) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(error.exit_status)
