"""Read the orders from the command line and carry them out; `supervisor.py` says how."""

import argparse
import sys
from pathlib import Path

# This file is started by its path and with -I, so that nothing of the working directory or of a neighbour (there is a
# select.py) comes in the way of the standard library.
sys.path.append(str(Path(__file__).parents[2]))
from mcore.supervise.supervisor import Orders, Supervisor


def main() -> int:
    """Exit status of the command, or 128 plus the signal that ended it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--timeout-s", type=float)
    parser.add_argument("--stall-timeout-s", type=float)
    parser.add_argument("--progress", type=Path, action="append", default=[])
    parser.add_argument("--stacks", type=Path)
    parser.add_argument("--log", default="")
    parser.add_argument("--log-offset", type=int, default=0)
    parser.add_argument("command", nargs="+")
    given = vars(parser.parse_args())
    command = given.pop("command")
    return Supervisor(Orders(**{**given, "progress": tuple(given["progress"])})).work(command)


if __name__ == "__main__":
    sys.exit(main())
