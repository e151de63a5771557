"""The run file that a stage's process is handed."""

from __future__ import annotations

from pathlib import Path

from configs.schema.load import RunFileError, load_run
from configs.schema.run import RunConfig
from mcore.errors import ConfigError, Problem


def read_run(run_file: Path) -> RunConfig:
    """The validated run of a file.

    Raises:
        ConfigError: All problems of the file at once.
    """
    try:
        return load_run(run_file)
    except RunFileError as exc:
        problems = [Problem(place, found=what) for place, what in exc.problems]
        raise ConfigError(f"{run_file} is no run", problems) from exc
