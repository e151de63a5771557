"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore.errors import ArtifactError, ConfigError, Problem


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace a small text file in one step: after a crash it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_path(path.parent)


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Check an output folder before any work is done for it.

    Raises:
        ConfigError: It exists and may not be overwritten, or can't be made.
    """
    if output.exists() and not overwrite:
        raise ConfigError(
            "the output folder is in the way",
            [
                Problem(
                    str(output), "no such folder", "one", "Name another --output, or pass --overwrite to replace it."
                )
            ],
        )


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `output` in one rename when the block ends well.

    If the block raises, what was written is removed and `output` is as before. After a kill -9 the unfinished folder
    stays beside it as `.<name>.partial` and is cleared by the next attempt.

    Raises:
        ConfigError: `output` exists and `overwrite` is off.
        ArtifactError: The folder could not be made.
    """
    output = output.absolute()
    refuse_existing(output, overwrite=overwrite)
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as exc:
        raise ArtifactError("the output folder can't be made", [Problem(str(partial), found=str(exc))]) from exc
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in partial.rglob("*"):
        if not file.is_symlink():
            fsync_path(file)
    fsync_path(partial)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    partial.rename(output)
    fsync_path(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)
