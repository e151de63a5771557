"""Names of what a store holds: of kinds, keys and runs, of artifacts, of files in them. None leads out of the store.

They come from command lines, run files and manifests, so they are checked wherever a path is made of them.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from mcore.errors import ConfigError, Problem

_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.+-]{0,127}", re.ASCII)
"""Kinds, keys and runs: no separator, no dot in front, nothing that a terminal or another system takes otherwise."""


def checked_name(name: str) -> str:
    """The name of a kind, a key or a run, as it is.

    Raises:
        ConfigError: It is none.
    """
    if not _NAME.fullmatch(name):
        expected = "letters, digits, '_', '.', '+' and '-', 128 of them at most, no '.', '+' or '-' in front"
        raise ConfigError("that is no name of anything in a store", [Problem(ascii(name), expected)])
    return name


def checked_artifact(name: str) -> tuple[str, str]:
    """Kind and key of `kind/key`.

    Raises:
        ConfigError: It is no such name.
    """
    kind, _, key = name.partition("/")
    return checked_name(kind), checked_name(key)


def checked_file(name: str) -> str:
    """The path of a file in an artifact, relative to the artifact's folder, as it is.

    Raises:
        ConfigError: It leads out of there, or is no path.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
        raise ConfigError("that is no name of a file in an artifact", [Problem(ascii(name), "a path below its folder")])
    return name
