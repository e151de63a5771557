"""Runs conversions that are there to be killed: a process that has imported everything forks one for each line.

    {"what": "convert" or "export", "arguments": [paths], "options": {…}}

It prints the process id of the conversion, and the exit status or the negative signal when that has ended.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from mcore.bridge.convert import convert
from mcore.bridge.export import export


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run = {"convert": convert, "export": export}[job["what"]]
                run(*map(Path, job["arguments"]), **job["options"])
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
