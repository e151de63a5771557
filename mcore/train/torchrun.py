"""torchrun for a terminal: `python -m mcore.train.torchrun --nproc_per_node 2 -m mcore.train RUN.yaml …`.

A rank that fails prints its error and writes it to the error file (`mcore/child.py`). torchrun's own log, traceback and
table say nothing more, so they are left out then, and the exit status is the error's. If a rank was lost without a
word, torchrun's account is all there is, and is shown.

SIGTERM and Ctrl-C go to the ranks, which finish their step, save, and leave with status 75; torchrun waits for them as
for any others. Left to itself it would kill them after 30 s and end with a traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import error_from_json
from mcore.progress import say


def main() -> None:
    """Run torchrun with this command's arguments."""
    stop: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        stop.append(number)
        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)
        if not ranks:
            raise SystemExit(_nothing_saved(number))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    # What torchrun takes by itself, with a banner that says so.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Not at the top: these imports take seconds, and a signal may come meanwhile.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--signals-to-handle", "SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as exc:
        error_file = Path(os.environ.get(ERROR_FILE_VARIABLE, ""))
        if error_file.is_file():
            sys.exit(error_from_json(error_file.read_text()).exit_status)
        if stop and all(failure.exitcode == -signal.SIGTERM for failure in exc.failures.values()):
            sys.exit(_nothing_saved(stop[0]))
        raise


def _nothing_saved(number: int) -> int:
    say("stopped before training began; run the same command again")
    return 128 + number


if __name__ == "__main__":
    main()
