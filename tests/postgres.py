"""Run a command while Prefect's servers use a PostgreSQL of their own: `python tests/postgres.py pytest -m server`.

The database is new, listens on a socket in a folder of its owner only, and is gone with the command. In the end it must
hold flow runs: a command that used another database has shown nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

USER = "postgres"
"""Who PostgreSQL runs as when root starts this: it refuses to run as root itself."""
DATABASE = "prefect"
START_S = 30.0


def program(name: str) -> str:
    """A program of PostgreSQL's; Debian keeps those of a server off the path."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    if found is None:
        sys.exit(f"{name} is not installed (Debian: apt install postgresql)")
    return found


def ask(folder: Path, query: str) -> str:
    """What the database answers."""
    command = [program("psql"), "-h", folder, "-U", USER, "-d", DATABASE, "-Atc", query]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def postgres() -> Iterator[tuple[Path, Mapping[str, str]]]:
    """A running PostgreSQL: the folder of its socket, and the variables that have Prefect's server use it."""
    whose = {"user": USER, "group": USER} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if whose:
            shutil.chown(folder, **whose)
        data = folder / "data"
        initdb = [program("initdb"), "-D", data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/", **whose)
        settings = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=200"]
        start = [program("postgres"), "-D", data, *(word for one in settings for word in ("-c", one))]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(start, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/", **whose)
        try:
            deadline = time.monotonic() + START_S
            while subprocess.run(
                [program("createdb"), "-h", folder, "-U", USER, DATABASE], capture_output=True
            ).returncode:
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"PostgreSQL does not start:\n{(folder / 'log').read_text()}")
                time.sleep(0.2)
            address = f"postgresql+asyncpg://{USER}@/{DATABASE}?host={folder}"
            yield folder, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": address}
        finally:
            server.terminate()
            server.wait()


def main(command: list[str]) -> int:
    """Exit status of the command; 1 if it left no flow run in the database."""
    with postgres() as (folder, variables):
        status = subprocess.run(command, env={**os.environ, **variables}).returncode
        num_flow_runs = int(ask(folder, "select count(*) from flow_run")) if status == 0 else 0
        version = ask(folder, "show server_version")
    if status == 0:
        sys.stdout.write(f"PostgreSQL {version} held {num_flow_runs} flow runs\n")
    return status or int(num_flow_runs == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
