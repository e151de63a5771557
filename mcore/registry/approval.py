"""Who was asked whether a model may be promoted, and what he said: a file in the registry, with a server or without.

The first answer counts, and none in time means no. The time counts from the asking, whatever becomes of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from mcore.errors import ConfigError, Problem
from mcore.folders import write_durably
from mcore.registry.aliases import Registry, user_name
from mcore.runs import now
from mcore.store_names import checked_name

APPROVALS = "approvals"
Answer = Literal["approved", "rejected"]


@dataclass(frozen=True, slots=True)
class Request:
    """A question, and its answer.

    Attributes:
        key: Key of the promotion's artifact: the model, what speaks for it, and where it would go.
        run: The run that asks.
        alias: The alias that would move.
        artifact: `export/key` of the model.
        summary: Why it would be promoted.
        asked: Time in UTC, ISO 8601.
        until: When it counts as answered with no.
        flow_run: Prefect's flow run that is suspended for it; None if a process waits.
        answer: What was said; None so far.
        by: Who said it.
        reason: His reason.
        answered: When.
    """

    key: str
    run: str
    alias: str
    artifact: str
    summary: str
    asked: str
    until: str
    flow_run: str | None = None
    answer: Answer | None = None
    by: str | None = None
    reason: str = ""
    answered: str | None = None

    @property
    def left_s(self) -> float:
        """Seconds until no answer means no; negative behind that."""
        return (datetime.fromisoformat(self.until) - datetime.now(UTC)).total_seconds()

    @property
    def is_open(self) -> bool:
        """Whether an answer still counts."""
        return self.answer is None and self.left_s > 0

    @property
    def verdict(self) -> str:
        """The answer in words."""
        if self.answer is None:
            return f"nobody answered until {self.until}, which means no"
        return f"{self.answer} by {self.by}{f': {self.reason}' if self.reason else ''}"


def _path(registry: Registry, key: str) -> Path:
    return registry.folder / APPROVALS / f"{checked_name(key)}.json"


def read_request(registry: Registry, key: str) -> Request | None:
    """The question about a promotion; None if nobody was asked."""
    try:
        return Request(**json.loads(_path(registry, key).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as exc:
        fix = "Remove it; then it is asked again."
        raise ConfigError(
            "a question can't be read", [Problem(str(_path(registry, key)), found=str(exc), fix=fix)]
        ) from exc


def ask(
    registry: Registry, key: str, *, run: str, alias: str, artifact: str, summary: str, timeout_s: float,
    flow_run: str | None = None,
) -> Request:  # fmt: skip
    """Ask, or find what was asked before: a run that was killed while it waited goes on waiting.

    Args:
        registry: The registry of the model.
        key: Key of the promotion's artifact.
        run: Name of the run.
        alias: The alias that would move.
        artifact: `export/key` of the model.
        summary: Why it would be promoted.
        timeout_s: Seconds until no answer means no.
        flow_run: Prefect's flow run that will be suspended.
    """
    with registry.locked():
        before = read_request(registry, key)
        if before is not None:
            request = replace(before, run=run, flow_run=flow_run) if before.is_open else before
        else:
            until = (datetime.now(UTC) + timedelta(seconds=timeout_s)).isoformat(timespec="microseconds")
            request = Request(key, run, alias, artifact, summary, now(), until, flow_run)
        _write(registry, request)
    return request


def answer(registry: Registry, key: str, said: Answer, *, reason: str = "", by: str | None = None) -> Request:
    """Answer a question.

    Args:
        registry: The registry of the model.
        key: Key of the promotion's artifact.
        said: The answer.
        reason: Why.
        by: Who says it; the system's user if not given.

    Raises:
        ConfigError: Nobody asked, or it was answered, or it is too late.
    """
    with registry.locked():
        request = read_request(registry, key)
        if request is None or not request.is_open:
            found = "nobody asks" if request is None else request.verdict
            raise ConfigError("there is nothing to answer", [Problem(registry.model, "an open question", found)])
        request = replace(request, answer=said, by=by or user_name(), reason=reason, answered=now())
        _write(registry, request)
    return request


def questions(registry: Registry) -> Iterator[Request]:
    """All questions about a model's promotions, oldest first."""
    paths = (registry.folder / APPROVALS).glob("[!.]*.json")
    found = [request for path in paths if (request := read_request(registry, path.stem)) is not None]
    yield from sorted(found, key=lambda request: request.asked)


def _write(registry: Registry, request: Request) -> None:
    path = _path(registry, request.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(asdict(request), indent=2) + "\n")
