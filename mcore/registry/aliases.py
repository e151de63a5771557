"""Aliases and their history. An alias moves in one rename, so that a reader sees the old model or the new one.

The line of history is written before the rename, with what the alias pointed to before and after. A process that is
killed between the two leaves a last line that the alias does not bear out: it counts as not done, for everybody who
reads, and the next move says so in a line of its own before it goes on.
"""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from configs.schema.promote import MODEL_NAME, Alias
from mcore.artifacts import Store, publish_link
from mcore.errors import ConfigError, Problem
from mcore.folders import fsync_path, remove_unwritten
from mcore.registry.release import Release
from mcore.runs import REGISTER_LOCK, now

REGISTRY = "registry"
RELEASES = "releases"
HISTORY = "history.jsonl"
ALIASES: tuple[Alias, ...] = get_args(Alias)


@dataclass(frozen=True, slots=True)
class Move:
    """A line of history.

    Attributes:
        time: UTC, ISO 8601.
        alias: The alias.
        action: `undone` says of the line before it that its writer was killed before the alias moved.
        before: Release that the alias pointed to; None if to nothing.
        after: Release that it points to since.
        artifact: `export/key` that `after` serves, with the digest of its content.
        content: That digest.
        by: User of the system.
        reason: Why, in words: the comparison with the model in production, who agreed.
        run: Name of the run that the model is of, if it is known.
    """

    time: str
    alias: Alias
    action: Literal["promoted", "rolled back", "undone"]
    before: str | None
    after: str | None
    artifact: str
    content: str
    by: str
    reason: str
    run: str | None = None


class Registry:
    """The aliases of one model.

    Args:
        store: The store.
        model: Name of the model.

    Raises:
        ConfigError: The name can't be a folder of the registry.
    """

    def __init__(self, store: Store, model: str) -> None:
        if not re.fullmatch(MODEL_NAME, model):
            raise ConfigError("no name of a model", [Problem(model, f"a name like {MODEL_NAME}", "another")])
        self.store = store
        self.model = model
        self.folder = store.root / REGISTRY / model

    def link(self, alias: Alias) -> Path:
        """The stable path: what a server is given to serve."""
        return self.folder / alias

    def release_folder(self, release: str) -> Path:
        """Where a release is, or will be."""
        return self.folder / RELEASES / release

    def points_to(self, alias: Alias) -> str | None:
        """Release that an alias points to; None if to nothing."""
        try:
            return self.link(alias).readlink().name
        except OSError:
            return None

    def release(self, alias: Alias) -> Release | None:
        """The release that an alias points to; None if to nothing.

        Raises:
            ValueError: To something that can't be read.
        """
        name = self.points_to(alias)
        return None if name is None else Release.read(self.release_folder(name))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the right to move this model's aliases. The system frees it when its holder dies."""
        with self.store.lock(REGISTRY, self.model):
            yield

    def move(
        self,
        alias: Alias,
        action: Literal["promoted", "rolled back"],
        release: Release,
        *,
        reason: str,
        run: str | None = None,
    ) -> None:
        """Point an alias at a release that is there. The caller holds the lock."""
        before = self.points_to(alias)
        artifact, content = release.artifact, release.content
        with self.store.lock(*REGISTER_LOCK):  # no collection decides meanwhile
            lines = self._lines()
            for last in [line for line in lines if line.alias == alias][-1:]:
                if last.action != "undone" and last.after != before:
                    undone = Move(
                        now(), alias, "undone", last.after, before, last.artifact, last.content, user_name(),
                        "its writer ended before the alias moved",
                    )  # fmt: skip
                    self._append(undone)
            self._append(
                Move(now(), alias, action, before, release.id, artifact, content, user_name(), reason, run)
            )  # fmt: skip
            remove_unwritten(self.folder)
            publish_link(self.link(alias), self.release_folder(release.id))

    def history(self) -> list[Move]:
        """Every move that took place, oldest first, and no other."""
        done: list[Move] = []
        open_: dict[str, Move] = {}  # the last line of each alias, until something bears it out
        for line in self._lines():
            before = open_.pop(line.alias, None)
            if before is not None and line.action != "undone":
                done.append(before)
            if line.action != "undone":
                open_[line.alias] = line
        done += [line for alias, line in open_.items() if line.after == self.points_to(line.alias)]
        return sorted(done, key=lambda line: line.time)

    def stack(self, alias: Alias) -> list[str]:
        """Releases that an alias would be rolled back through, the present one last."""
        stack: list[str] = []
        for line in self.history():
            if line.alias != alias or line.after is None:
                continue
            if line.action == "promoted":
                stack.append(line.after)
            else:
                while stack and stack[-1] != line.after:
                    stack.pop()
        return stack

    def rolled_back(self, alias: Alias, content: str) -> Move | None:
        """The move that took the alias away from a model, if that was the last that became of this model here."""
        found: Move | None = None
        contents = {line.after: line.content for line in self.history()}
        for line in self.history():
            if line.alias != alias:
                continue
            if line.action == "rolled back" and line.before is not None and contents.get(line.before) == content:
                found = line
            elif line.content == content:
                found = None
        return found

    def _lines(self) -> list[Move]:
        """Lines as they are written; one that a crash cut short is left out."""
        path = self.folder / HISTORY
        found = []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                found.append(Move(**json.loads(line)))
            except (TypeError, ValueError):
                continue
        return found

    def _append(self, move: Move) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / HISTORY).open("ab+") as file:
            if file.tell() and not _ends_a_line(file.name):
                file.write(b"\n")  # behind a line that a crash cut short
            file.write(json.dumps(asdict(move)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_path(self.folder)


def _ends_a_line(path: str) -> bool:
    with Path(path).open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def user_name() -> str:
    """Who moves it, as the system knows him."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"user {os.getuid()}"  # a container's user without a name


def models(store: Store) -> list[str]:
    """Names of all models that the registry has."""
    return sorted(folder.name for folder in store.root.glob(f"{REGISTRY}/*") if folder.is_dir())


def registered(store: Store) -> dict[str, list[str]]:
    """Artifacts that must stay for the sake of aliases, by `model alias`: where they point, and where a rollback goes.

    The former release of each alias is kept as well, or a rollback would find nothing.
    """
    kept: dict[str, list[str]] = {}
    for model in models(store):
        registry = Registry(store, model)
        for alias in ALIASES:
            present = registry.points_to(alias)
            former = [name for name in registry.stack(alias) if name != present][-1:]
            for name, why in [
                (present, f"{alias} of {model}"),
                *((one, f"{alias} of {model} before") for one in former),
            ]:
                if name is None:
                    continue
                try:
                    kept.setdefault(why, []).extend(Release.read(registry.release_folder(name)).needs)
                except ValueError:
                    continue  # damaged: `aliases` says so
    return kept
