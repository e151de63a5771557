"""Secrets of the environment, kept out of whatever is written down.

Nothing here writes a secret on purpose. But libraries print requests, settings and whole environments when they fail,
and their output is kept. So what the environment calls a token, a key or a password, and what stands as a password in
an address, is replaced by as many asterisks in everything that a stage's processes leave behind.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

SHORTEST = 8
"""Characters of the shortest value that is taken for a secret: `1` and `true` are none, and would be everywhere."""

_NAME = re.compile(
    r"(?:^|_)(?:\w*TOKEN|\w*SECRET|PASSWORD|PASSWD|PWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH_STRING|CREDENTIALS?)$",
    re.IGNORECASE,
)
_IN_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/@:]*:([^\s/]+)@", re.IGNORECASE)
_NO_SECRETS = {"PWD", "OLDPWD"}


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values that must not be written down, the longest first.

    Args:
        environment: Variables by name.
    """
    found = set()
    for name, value in environment.items():
        if _NAME.search(name) and name not in _NO_SECRETS:
            found.add(value)
        found.update(_IN_ADDRESS.findall(value))
    return sorted((value for value in found if len(value) >= SHORTEST), key=lambda value: (-len(value), value))


def redacted(text: str, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text, as long as it was, without this process' secrets, and those among `more` variables."""
    for secret in secrets_of({**os.environ, **more}):
        text = text.replace(secret, "*" * len(secret))
    return text


def redact_file(path: Path, offset: int = 0, more: Mapping[str, str] = MappingProxyType({})) -> None:
    """Overwrite this process' secrets, and those among `more` variables, in a file from `offset` bytes on.

    No other byte changes, and none moves.
    """
    secrets = [os.fsencode(secret) for secret in secrets_of({**os.environ, **more})]
    if not secrets or path.stat().st_size <= offset:
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for secret in secrets:
            place = content.find(secret, offset)
            while place >= 0:
                content[place : place + len(secret)] = b"*" * len(secret)
                place = content.find(secret, place)


def without_prefect_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process, which has no business with Prefect's server or its database."""
    return {name: value for name, value in environment.items() if not _is_prefect_secret(name, value)}


def _is_prefect_secret(name: str, value: str) -> bool:
    return name.startswith("PREFECT_") and bool(secrets_of({name: value}))
