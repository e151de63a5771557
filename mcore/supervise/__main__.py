"""Read the orders from the command line and carry them out; `supervisor.py` says how."""

import argparse
import sys
from pathlib import Path

# This file is started by its path and with -I, so that nothing of the working directory or of a neighbour (there is a
# select.py) comes in the way of the standard library.
sys.path.append(str(Path(__file__).parents[2]))
from mcore.devices import Request
from mcore.supervise.duty import LeaseOrders
from mcore.supervise.supervisor import Orders, Supervisor


def main() -> int:
    """Exit status of the command, or 128 plus the signal that ended it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--lease", type=Path)
    parser.add_argument("--token", type=int, default=0)
    parser.add_argument("--command-digest", default="")
    parser.add_argument("--error-file", default="")
    parser.add_argument("--reattach-s", type=float, default=0.0)
    parser.add_argument("--timeout-s", type=float)
    parser.add_argument("--stall-timeout-s", type=float)
    parser.add_argument("--progress", type=Path, action="append", default=[])
    parser.add_argument("--stacks", type=Path)
    parser.add_argument("--log", default="")
    parser.add_argument("--log-offset", type=int, default=0)
    parser.add_argument("--devices", type=Request.from_json)
    parser.add_argument("command", nargs="+")
    given = vars(parser.parse_args())
    command = given.pop("command")
    lease = LeaseOrders(
        given.pop("lease"), given.pop("token"), given.pop("command_digest"), given.pop("error_file"),
        given.pop("reattach_s"),
    )  # fmt: skip
    orders = Orders(
        **{**given, "progress": tuple(given["progress"]), "lease": lease if lease.folder is not None else None}
    )
    return Supervisor(orders).work(command)


if __name__ == "__main__":
    sys.exit(main())
