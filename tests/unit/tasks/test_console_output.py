"""A process whose output nobody reads any more goes on, and ends well."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from prefect.logging import get_logger
from prefect.logging.configuration import setup_logging
from tasks.console_output import go_on_without_reader
setup_logging()
go_on_without_reader()
sys.stdin.readline()
for line in range(3):
    get_logger("test").info("line %d", line)
    print("and one", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text("came through")
"""


def test_a_log_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path / "end")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_LOGGING_LEVEL": "INFO"},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()  # the worker is gone
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.wait(120) == 0
    assert (tmp_path / "end").read_text() == "came through"
