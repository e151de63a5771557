"""Data sets of hubs: which commit a revision is, and their files on this machine. Light: no client of a hub.

The clients run in a process of their own, since they read their settings when they are imported. What they are asked
for are the files of rows as they lie in the repository, not Arrow tables made of them: a row is what its author wrote,
has a file and a line, and is read by the same readers as a local one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mcore.child import ERROR_FILE_VARIABLE, QUIET_ENVIRONMENT
from mcore.data.sources.names import COMMIT, HubDataset
from mcore.errors import DataError, Problem, error_from_json

LOCATE_TIMEOUT_S = 120.0
"""Seconds that a hub may take to say what is in a repository."""
INDEX_FILE = "index.json"
"""`{subset: [file, ...]}` of a data set that is here; the files lie beside it under `FILES`."""
FILES = "files"


def identity(dataset: HubDataset) -> str:
    """The data set at a commit: what its rows depend on.

    A commit of the Hugging Face hub stands for itself; for all others the hub is asked.

    Raises:
        DataError: The hub can't be reached, or has no such data set.
    """
    return f"{dataset.hub}:{dataset.repo}@{commit_of(dataset)}:{dataset.rows}"


def commit_of(dataset: HubDataset) -> str:
    """The commit of the data set's revision; of ModelScope, which tells none, a digest of its files.

    Raises:
        DataError: As `identity`.
    """
    if dataset.hub == "hf" and COMMIT.fullmatch(dataset.revision):
        return dataset.revision
    commit: str = _locate(dataset)["commit"]
    return commit


def files_of(dataset: HubDataset) -> dict[str, list[Path]]:
    """The files of rows of each subset, downloaded if they are not here.

    They stay in the user's cache (`XDG_CACHE_HOME`), one folder a commit, and appear there whole or not at all.

    Raises:
        DataError: The hub can't be reached, has no such data set, or the data set has no such subset or split.
    """
    commit = commit_of(dataset)
    folder = _cache() / dataset.hub / dataset.repo / f"{commit[:12]}-{_digest(f'{commit} {dataset.rows}')}"
    if not (folder / INDEX_FILE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            (partial / INDEX_FILE).write_text(json.dumps(_locate(dataset)["files"]))
            _ask("fetch", dataset, "--commit", commit, "--output", str(partial), timeout_s=None)
            try:
                partial.rename(folder)
            except OSError:  # another process was faster
                if not (folder / INDEX_FILE).is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    index: dict[str, list[str]] = json.loads((folder / INDEX_FILE).read_text())
    return {subset: [folder / FILES / name for name in names] for subset, names in index.items()}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcore-flows" / "datasets"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def _locate(dataset: HubDataset) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(_ask("locate", dataset, timeout_s=LOCATE_TIMEOUT_S))
    return answer


def _ask(command: str, dataset: HubDataset, *options: str, timeout_s: float | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        environment = {**os.environ, **QUIET_ENVIRONMENT, ERROR_FILE_VARIABLE: str(error_file)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mcore.data.sources", command, str(dataset), *options],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as exc:
            found = f"nothing in {timeout_s:.0f} s"
            problem = Problem(str(dataset), "an answer of the hub", found, "Check the network or the proxy.")
            raise DataError("the data's hub does not answer", [problem]) from exc
        if error_file.exists():
            raise error_from_json(error_file.read_text())
    if done.returncode:
        problem = Problem(str(dataset), "an answer of the hub", done.stderr[-2000:])
        raise DataError("the data's hub could not be asked", [problem])
    return done.stdout
