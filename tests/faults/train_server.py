"""Trains runs that are there to be killed: a process that has imported everything forks one for each line.

    {"run": run file, "base": folder, "output": folder}

It prints the process id of the training, and the exit status or the negative signal when that has ended.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from configs.schema.load import load_run
from mcore.train.methods import sft  # noqa: F401  imported by name when training starts
from mcore.train.run import train


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                train(load_run(Path(job["run"])), Path(job["base"]), Path(job["output"]))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
