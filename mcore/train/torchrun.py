"""torchrun for a terminal: `python -m mcore.train.torchrun --nproc_per_node 2 -m mcore.train RUN.yaml …`.

A rank that fails prints its error and writes it to the error file (`mcore/child.py`). torchrun's own log, traceback and
table say nothing more, so they are left out then, and the exit status is the error's. If a rank was lost without a
word, torchrun's account is all there is, and is shown.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import error_from_json


def main() -> None:
    """Run torchrun with this command's arguments."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError:
        error_file = Path(os.environ.get(ERROR_FILE_VARIABLE, ""))
        if not error_file.is_file():
            raise
        sys.exit(error_from_json(error_file.read_text()).exit_status)


if __name__ == "__main__":
    main()
