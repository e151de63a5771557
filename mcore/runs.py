"""What the store knows of its runs: a record of each, written when it starts and when it ends, read by everything else.

    <store>/runs/<name>/run.json        the newest attempt: settings, stages with their keys, how it ended
    <store>/runs/<name>/history.jsonl   the attempts before it, a line each, oldest first
    <store>/runs/<name>/<stage>/        log of a stage; the error it ended with, or what a gate found
    <store>/runs/<name>/model           link to what the run published

The record tells what was meant and how it ended; what is there is told by the store, and whether a run is under way by
the lease that it holds. So a run that was killed, which could write no more, is seen as what it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mcore.artifacts import Manifest, Store
from mcore.errors import ConfigError
from mcore.folders import fsync_path, remove_unwritten, write_durably
from mcore.leases import holder
from mcore.store_names import checked_name
from mcore.supervise.claims import Claim

RECORD = "run.json"
HISTORY = "history.jsonl"
ROOM = ".room"
ROOM_BYTES = 64 * 1024
"""Room that a run takes when it starts and gives back when it ends, so that it can tell how on a full disk."""
LINK = "model"
"""Name of the link in a run's folder to the model that it published."""

State = Literal["running", "done", "failed", "rejected", "stopped", "cancelled", "lost"]
"""`rejected`: a gate said no. `stopped`: on request, and it goes on. `lost`: it was killed and could not say so."""

ENDED_BADLY: tuple[State, ...] = ("failed", "rejected", "stopped", "cancelled", "lost")

REGISTER_LOCK = ("store", "register")
"""Held while a run says which artifacts it needs, and while it is decided which artifacts nobody needs."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage of a run as it was planned: `inputs` maps each role to `kind/key`."""

    name: str
    kind: str
    key: str
    inputs: Mapping[str, str]

    @property
    def artifact(self) -> str:
        """`kind/key` of what it makes."""
        return f"{self.kind}/{self.key}"


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended a run: the stage that was not finished, and the error as its class and first line."""

    stage: str | None
    artifact: str | None
    error: str
    summary: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One attempt of a run.

    Attributes:
        name: Name of the run.
        flow: Name of the flow, such as `pipeline`.
        config: The run file's content, defaults filled in, the model's source at a commit.
        stages: Stages in their order.
        folder: Working directory, which relative paths start from.
        pid: The flow's process.
        started: Time in UTC, ISO 8601.
        ended: The same; None while it is under way, and of one that was killed.
        state: How it ended.
        outcomes: By stage that was reached: `cached`, and `seconds` in this attempt.
        failure: What ended it, unless that went well.
    """

    name: str
    flow: str
    config: Mapping[str, Any]
    stages: tuple[StageRecord, ...]
    folder: str
    pid: int
    started: str
    ended: str | None = None
    state: State = "running"
    outcomes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failure: Failure | None = None

    def to_json(self) -> str:
        """The record on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """The record that `to_json` wrote.

        Raises:
            ValueError: It is none.
        """
        try:
            data = json.loads(text)
            stages = tuple(StageRecord(**stage) for stage in data.pop("stages"))
            failure = data.pop("failure")
            for name in (data["name"], *(stage.name for stage in stages)):  # paths are made of them
                checked_name(name)
            return cls(**data, stages=stages, failure=None if failure is None else Failure(**failure))
        except (TypeError, KeyError, AttributeError, ValueError, ConfigError) as exc:
            raise ValueError(f"no record of a run: {exc!r}") from exc


def now() -> str:
    """The time in UTC, as records and manifests have it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def begin(store: Store, record: RunRecord) -> None:
    """Write the record of a run that starts; the one before it becomes history.

    From here on nothing that the run needs is collected. The caller holds the run's lock.
    """
    folder = store.run_dir(record.name)
    with store.lock(*REGISTER_LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unwritten(folder)
        before = read_record(store, record.name)
        if before is not None:
            lost = before.state == "running"  # or it would have said how it ended
            _append(folder / HISTORY, replace(before, state="lost") if lost else before)
        write_durably(folder / RECORD, record.to_json() + "\n")
        (folder / ROOM).write_bytes(bytes(ROOM_BYTES))


def end(store: Store, record: RunRecord) -> None:
    """Write how the run ended."""
    folder = store.run_dir(record.name)
    (folder / ROOM).unlink(missing_ok=True)
    write_durably(folder / RECORD, record.to_json() + "\n")


def _append(path: Path, record: RunRecord) -> None:
    with path.open("a") as file:
        file.write(record.to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_path(path.parent)


def read_record(store: Store, name: str) -> RunRecord | None:
    """The newest attempt of a run as it was written; None if there is none that can be read."""
    try:
        return RunRecord.from_json((store.run_dir(name) / RECORD).read_text())
    except (OSError, ValueError):
        return None


def current(store: Store, name: str) -> RunRecord | None:
    """The newest attempt of a run; one that was killed is `lost`."""
    record = read_record(store, name)
    if record is None or record.state != "running" or is_under_way(store, name):
        return record
    record = read_record(store, name)  # it may have ended between the two looks
    return replace(record, state="lost") if record is not None and record.state == "running" else record


def history(store: Store, name: str) -> list[RunRecord]:
    """All attempts of a run, oldest first; a line that a crash cut short is left out."""
    found = []
    path = store.run_dir(name) / HISTORY
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(RunRecord.from_json(line))
        except ValueError:
            continue
    newest = current(store, name)
    return found if newest is None else [*found, newest]


def run_names(store: Store) -> list[str]:
    """Names of all runs that have a folder, also of those that an earlier version started, which have no record."""
    return sorted(folder.name for folder in store.root.glob("runs/*") if folder.is_dir() and not folder.is_symlink())


def records(store: Store) -> Iterator[RunRecord]:
    """The newest attempt of each run, by name."""
    for name in run_names(store):
        record = current(store, name)
        if record is not None:
            yield record


def is_under_way(store: Store, name: str) -> bool:
    """Whether a process holds the run's name."""
    return holder(store.lease_folder("run", name)) is not None


def is_being_made(store: Store, kind: str, key: str) -> bool:
    """Whether a run makes this artifact now, or processes of one that was killed are still ending."""
    return maker(store, kind, key) is not None


def maker(store: Store, kind: str, key: str) -> Claim | None:
    """Who makes this artifact now, or whose processes are still at it; None if nobody does."""
    return holder(store.lease_folder(kind, key))


def published(store: Store, name: str) -> str | None:
    """`kind/key` of what a run published; None if that is nothing."""
    link = store.run_dir(name) / LINK
    try:
        target = link.resolve() if link.is_symlink() else None
    except OSError:
        return None
    if target is None or not target.is_relative_to(store.root.resolve()):
        return None
    return f"{target.parent.name}/{target.name}"


def lineage(manifests: Mapping[str, Manifest], *artifacts: str) -> set[str]:
    """Artifacts, those they were made from, and so on; of those in `manifests`, which has them by `kind/key`."""
    found: set[str] = set()
    pending = list(artifacts)
    while pending:
        name = pending.pop()
        if name in manifests and name not in found:
            found.add(name)
            pending += manifests[name].inputs.values()
    return found


def judged(manifests: Mapping[str, Manifest], made: set[str]) -> set[str]:
    """`made`, with what judges it: proofs, evaluations and comparisons that were made from nothing else."""
    found = made | {source for name in made for source in manifests[name].inputs.values()}
    for kind in JUDGING:
        found |= {name for name, m in manifests.items() if m.kind == kind and found >= set(m.inputs.values())}
    return found & manifests.keys()


JUDGING = ("verify", "evaluate", "compare", "promote")
"""Kinds of artifacts that a model is not made from, each behind what it needs."""
