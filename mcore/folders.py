"""Output folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcore.errors import ConfigError, Problem

_UNWRITTEN = ".unwritten"


def unwritten(path: Path) -> Path:
    """Where something small is made before it takes its name in one step; a kill leaves it to `remove_unwritten`."""
    return path.with_name(f".{path.name}.{os.getpid()}{_UNWRITTEN}")


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path, *, files: bool = True) -> None:
    """Make a folder and all folders below it durable, with the files in them unless `files` is off."""
    for path in folder.rglob("*"):
        if not path.is_symlink() and (path.is_dir() or files):
            fsync_path(path)
    fsync_path(folder)


def write_durably(path: Path, text: str) -> None:
    """Replace a small text file in one step: after a crash it holds the old text or the new one.

    What a kill leaves beside it is a hidden file, for `remove_unwritten`.
    """
    temporary = unwritten(path)
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def remove_unwritten(folder: Path) -> None:
    """Clear what kills left of what was `unwritten` in a folder that nobody writes to now."""
    for left in folder.glob(f".*{_UNWRITTEN}"):
        left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove whatever is there: a folder with all it holds, a file, a link (not what it points at), or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Check an output folder before any work is done for it.

    Raises:
        ConfigError: It exists and may not be overwritten, or holds the working directory, or has no place.
    """
    if os.path.lexists(output) and not overwrite:
        raise ConfigError(
            "the output folder is in the way",
            [
                Problem(
                    str(output), "no such folder", "one", "Name another --output, or pass --overwrite to replace it."
                )
            ],
        )
    if Path.cwd().is_relative_to(output.resolve()):
        raise ConfigError(
            "the output folder can't be replaced",
            [Problem(str(output), "a folder of its own", "the working directory or one above it")],
        )
    refuse_no_place(output)


def refuse_no_place(output: Path) -> None:
    """Check that something can be made at a path, with the folders above it that are not there.

    Raises:
        ConfigError: It can't, for what is above it.
    """
    above = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        found = "one that can't be written to" if above.is_dir() else "no folder"
        raise ConfigError("the output has no place", [Problem(f"{above}, above {output}", "a folder", found)])


def missing(**paths: Path) -> list[Problem]:
    """A problem for each path, given by its option's name, that is not there."""
    return [Problem(f"--{name}: no such file or folder: {path}") for name, path in paths.items() if not path.exists()]


def refuse_missing(**paths: Path) -> None:
    """Check what a command works on before anything is started, `missing` as an error.

    Raises:
        ConfigError: Names all that is not there.
    """
    if problems := missing(**paths):
        raise ConfigError("what the command works on is not there", problems)


def refuse_too_little_room(output: Path, num_bytes: int) -> None:
    """Check that an output folder's disk has room for what is to be written, before any of it is.

    Raises:
        ConfigError: It has not.
    """
    folder = next(path for path in output.absolute().parents if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        expected, found = f"{num_bytes / 1e9:.3f} GB free", f"{free / 1e9:.3f} GB"
        raise ConfigError("there is too little room for the output", [Problem(str(folder), expected, found)])


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `output` in one rename when the block ends well.

    If the block raises, what was written is removed and `output` is as before. After a kill -9 the unfinished folder
    stays beside it as `.<name>.partial` and is cleared by the next attempt. Two processes that make the same folder
    don't mix: the second is refused.

    Raises:
        ConfigError: `output` exists and `overwrite` is off, or another process is making it, or it can't be made.
    """
    refuse_existing(output, overwrite=overwrite)
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        descriptor = _claim(partial)
    except OSError as exc:
        raise ConfigError("the output folder can't be made", [Problem(str(partial), found=str(exc))]) from exc
    try:
        if replaced.exists() and not output.exists():  # killed between the two renames below
            replaced.rename(output)
        refuse_existing(output, overwrite=overwrite)  # again: another process may have finished meanwhile
        yield partial
        fsync_folder(partial)
        refuse_existing(output, overwrite=overwrite)
        if os.path.lexists(output):
            remove(replaced)
            output.rename(replaced)
        partial.rename(output)
        fsync_path(output.parent)
        with suppress(OSError):  # its new content is there; the old one may go later
            remove(replaced)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(output):
            replaced.rename(output)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _claim(partial: Path) -> int:
    """Make the folder, or empty the one that a dead process left, and hold the kernel's lock on it."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor))
        except BlockingIOError as exc:
            os.close(descriptor)
            raise ConfigError(
                "the output folder is being made by another process",
                [Problem(str(partial), fix="Wait for it, or name another --output.")],
            ) from exc
        if mine:
            for child in partial.iterdir():
                remove(child)
            return descriptor
        os.close(descriptor)  # its last holder renamed or removed it while we opened it
