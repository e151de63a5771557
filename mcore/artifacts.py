"""The artifact store: one folder an artifact, found by what it was made from, and there only when it is whole.

    <store>/<kind>/<key>/             the artifact's files, and manifest.json, written last
    <store>/.partial/<kind>-<key>/    what is being made; stays after a crash, so that a stage may go on from it
    <store>/.leases/<kind>-<key>/     who makes an artifact, or made it last (`mcore/leases.py`)
    <store>/.digests.json             SHA-256 of files by path, size and change times, so that nothing is read twice
    <store>/runs/<name>/              logs, report and result of a run

A folder without a valid manifest does not exist. A file counts as unchanged while its size, inode, modification and
change times are the ones it had when it was last hashed; otherwise it is hashed again. `mcore-flows artifacts verify`
hashes everything regardless. Artifacts hold no symbolic links: what they mean must not change from outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from mcore.errors import ArtifactError, ConfigError, Problem
from mcore.folders import fsync_folder, fsync_path, remove, remove_unwritten, unwritten, write_durably
from mcore.leases import Lease, OnWait, held
from mcore.store_names import checked_artifact, checked_file, checked_name

MANIFEST = "manifest.json"

RECORDS = ("metrics.json", "metrics.jsonl", "tensorboard/")
"""Files, and beginnings of their names, that tell how an artifact was made, not what it is: times are in them."""

CLOCK_TICK_S = 0.02
"""Seconds within which two changes of a file may get the same time stamp (the kernel's tick, with a margin)."""


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """What a task hands on instead of an artifact: small, and safe to show in a UI."""

    kind: str
    key: str
    path: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    content: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is and where it came from.

    `files` maps relative paths to `{"size": bytes, "sha256": hex}`; `inputs` maps input names to `kind/key`, and
    `input_content` to the content that they had; `ingredients` is all that went into the key.
    """

    kind: str
    key: str
    files: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    input_content: Mapping[str, str]
    ingredients: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    duration_s: float

    def to_json(self) -> str:
        """The text of `manifest.json`, with a digest of itself."""
        content = json.loads(json.dumps(asdict(self)))
        return json.dumps({"sha256": _text_digest(content), **content}, indent=2)

    @property
    def content(self) -> str:
        """Digest of what the artifact is. One that is made again to the bit keeps it, whatever its records say."""
        return _text_digest(
            {name: entry["sha256"] for name, entry in self.files.items() if not name.startswith(RECORDS)}
        )

    def outdated_inputs(self, content: Mapping[str, str]) -> list[str]:
        """Inputs that were made again since, under the same key, and came out otherwise.

        Args:
            content: Content of the inputs as they are now, by name; others are not looked at.
        """
        return [name for name, now in content.items() if self.input_content.get(name, now) != now]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an artifact's folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It was damaged or is none of ours.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text())
            digest = content.pop("sha256")
            manifest = cls(**content)
            for name in (f"{manifest.kind}/{manifest.key}", *manifest.inputs.values()):
                checked_artifact(name)
            for name in manifest.files:
                checked_file(name)
        except FileNotFoundError:
            raise
        except (OSError, TypeError, AttributeError, KeyError, ValueError, ConfigError) as exc:
            raise ValueError(f"can't be read: {exc!r}") from exc
        if _text_digest(content) != digest:
            raise ValueError("content changed since it was made")
        return manifest


@dataclass(frozen=True, slots=True)
class Status:
    """Whether an artifact can be used, and if not, why."""

    state: Literal["valid", "missing", "damaged"]
    why: str = ""
    manifest: Manifest | None = None


def digest_of(ingredients: Mapping[str, Any]) -> str:
    """Key of an artifact: SHA-256 of its ingredients as canonical JSON, 20 hexadecimal digits of it."""
    return _text_digest(ingredients)[:20]


def _text_digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DigestCache:
    """SHA-256 of files, remembered by path, size, inode, modification and change time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()
        self._changed = False

    def digest(self, path: Path, *, fresh: bool = False) -> str:
        """Digest of one file; `fresh` reads it even if it seems unchanged."""
        name = str(path.absolute())
        identity = _identity(path)
        known = self._known.get(name)
        if not fresh and known and known[0] == identity:
            return known[1]
        age_s = time.time() - identity[3] / 1e9
        if 0 <= age_s < CLOCK_TICK_S:  # a change after the hashing could bear the same time as the one before it
            time.sleep(CLOCK_TICK_S - age_s)
            identity = _identity(path)
        digest = file_digest(path)
        self._known[name] = (identity, digest)
        self._changed = True
        return digest

    def moved(self, old: Path, new: Path) -> None:
        """Tell that a file was renamed, so that it need not be read again. A rename may change the change time."""
        _, digest = self._known.pop(str(old.absolute()))
        self._known[str(new.absolute())] = (_identity(new), digest)
        self._changed = True

    def save(self) -> None:
        """Keep what was learnt; what another process saved meanwhile is merged in, what is gone is dropped."""
        if not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._path}.lock"):
            remove_unwritten(self._path.parent)
            merged = self._read() | self._known
            self._known = {name: entry for name, entry in merged.items() if Path(name).exists()}
            write_durably(self._path, json.dumps(self._known))
        self._changed = False

    def _read(self) -> dict[str, tuple[list[int], str]]:
        """What is on disk. Only a cache: what can't be read is computed again."""
        try:
            return {
                str(name): ([int(part) for part in identity], str(digest))
                for name, (identity, digest) in json.loads(self._path.read_text()).items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


class Store:
    """The artifacts below one folder.

    Args:
        root: The folder; made on the first write, so that looking at an absent store writes nothing.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self.digests = DigestCache(self.root / ".digests.json")

    def path(self, kind: str, key: str) -> Path:
        """Where the artifact is, or will be.

        Raises:
            ConfigError: That would not be a place in the store; so say all methods that take a name.
        """
        return self.root / checked_name(kind) / checked_name(key)

    def partial(self, kind: str, key: str) -> Path:
        """Where the artifact is made. The same path at every attempt, so that training resumes in it."""
        return self.root / ".partial" / f"{checked_name(kind)}-{checked_name(key)}"

    def run_dir(self, name: str) -> Path:
        """Logs, report and result of a run."""
        return self.root / "runs" / checked_name(name)

    def status(self, kind: str, key: str, *, fresh: bool = False) -> Status:
        """Whether the artifact is there and whole.

        Args:
            kind: Kind of artifact.
            key: Its key.
            fresh: Hash every file, also those that seem unchanged.
        """
        try:
            folder = self.path(kind, key)
            manifest = Manifest.read(folder)
        except ConfigError as exc:
            return Status("missing", exc.summary)
        except FileNotFoundError:
            return Status("missing", f"{MANIFEST} is missing") if folder.exists() else Status("missing", "not made yet")
        except ValueError as exc:
            return Status("damaged", f"{MANIFEST}: {exc}")
        if (manifest.kind, manifest.key) != (kind, key):
            return Status("damaged", f"{MANIFEST}: belongs to {manifest.kind}/{manifest.key}")
        if self._is_elsewhere(folder):
            return Status("damaged", "replaced by a link")
        folders = {folder}
        for name, entry in manifest.files.items():
            file = folder / name
            try:
                above = {path for path in file.parents if path.is_relative_to(folder)} - folders
                if file.is_symlink() or any(path.is_symlink() for path in above):
                    return Status("damaged", f"{name}: replaced by a link")
                folders |= above
                if file.stat().st_size != entry["size"]:
                    return Status("damaged", f"{name}: {file.stat().st_size} bytes, expected {entry['size']}")
                if self.digests.digest(file, fresh=fresh) != entry["sha256"]:
                    return Status("damaged", f"{name}: content changed since it was made")
            except FileNotFoundError:
                return Status("damaged", f"{name}: file is missing")
            except OSError as exc:
                return Status("damaged", f"{name}: {exc.strerror}")
        return Status("valid", manifest=manifest)

    def find(self, kind: str, key: str) -> ArtifactRef | None:
        """The artifact, if it is there and whole."""
        status = self.status(kind, key)
        return self.ref(status.manifest) if status.manifest else None

    def ref(self, manifest: Manifest) -> ArtifactRef:
        """The small reference that tasks hand on."""
        path = str(self.path(manifest.kind, manifest.key))
        return ArtifactRef(manifest.kind, manifest.key, path, manifest.metrics, manifest.content)

    def commit(
        self,
        kind: str,
        key: str,
        *,
        inputs: Mapping[str, str],
        input_content: Mapping[str, str],
        ingredients: Mapping[str, Any],
        metrics: Mapping[str, Any],
        versions: Mapping[str, str],
        duration_s: float,
        lease: Lease | None = None,
    ) -> ArtifactRef:
        """Turn the finished partial folder into the artifact: manifest last, then one rename.

        Args:
            kind: Kind of artifact.
            key: Its key.
            inputs: Artifacts it was made from, name to `kind/key`.
            input_content: What these held, name to `ArtifactRef.content`.
            ingredients: All that went into the key.
            metrics: Figures worth showing.
            versions: Package versions and code commit.
            duration_s: Seconds it took.
            lease: The lease under which it was made, asked right before it is put in place.

        Raises:
            ArtifactError: There is nothing to commit, or there are symbolic links in it.
            FencedError: Another run has taken the lease over.
        """
        partial, folder = self.partial(kind, key), self.path(kind, key)
        elsewhere = [place for place in (partial, folder.parent) if self._is_elsewhere(place)]
        if elsewhere:
            problems = [Problem(str(place), "a folder of the store", "a symbolic link") for place in elsewhere]
            raise ArtifactError(f"{kind}/{key} can't be committed", problems)
        remove(partial / MANIFEST)
        remove_unwritten(partial)
        contents = sorted(partial.rglob("*")) if partial.is_dir() else []
        links = [Problem(str(path), "a file or a folder", "a symbolic link") for path in contents if path.is_symlink()]
        files = [path for path in contents if path.is_file()]
        if links or not files:
            raise ArtifactError(f"{kind}/{key} can't be committed", links or [Problem(str(partial), "files", "none")])
        entries = {}
        for path in files:
            digest = self.digests.digest(path, fresh=True)
            entries[str(path.relative_to(partial))] = {"size": path.stat().st_size, "sha256": digest}
        manifest = Manifest(
            kind=kind,
            key=key,
            files=entries,
            inputs=dict(inputs),
            input_content=dict(input_content),
            ingredients=dict(ingredients),
            metrics=dict(metrics),
            versions=dict(versions),
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            duration_s=round(duration_s, 3),
        )
        fsync_folder(partial)  # the data is on disk before the manifest that vouches for it
        write_durably(partial / MANIFEST, manifest.to_json())
        damaged = partial.with_name(f"{partial.name}.damaged")
        remove(damaged)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if lease is not None:
            lease.renew()
        if os.path.lexists(folder):  # damaged or outdated, or we would not be here
            folder.rename(damaged)
        partial.rename(folder)
        for parent in (folder.parent, self.root):
            fsync_path(parent)
        remove(damaged)
        for name in entries:
            self.digests.moved(partial / name, folder / name)
        self.digests.save()
        return self.ref(manifest)

    def _is_elsewhere(self, folder: Path) -> bool:
        """Whether a folder of the store is, by a symbolic link on the way to it, somewhere else."""
        return folder.resolve() != self.root.resolve() / folder.relative_to(self.root)

    def lease_folder(self, kind: str, key: str) -> Path:
        """Where it is written who makes the artifact, or has the name."""
        return self.root / ".leases" / f"{checked_name(kind)}-{checked_name(key)}"

    @contextmanager
    def lock(
        self,
        kind: str,
        key: str,
        *,
        timeout_s: float = -1,
        run: str = "",
        flow_run: str = "",
        log_folder: Path | None = None,
        on_wait: OnWait | None = None,
    ) -> Iterator[Lease]:
        """Hold the right to make an artifact, or a name, for the block: a lease, which no dead holder keeps.

        Args:
            kind: Kind of artifact.
            key: Its key.
            timeout_s: Seconds to wait for another holder; without end if negative.
            run: Name of the run, for others to see.
            flow_run: Id of its flow run.
            log_folder: Where its log will be.
            on_wait: Called several times a second with who holds it; may raise.

        Raises:
            ArtifactError: Another run held it for longer than `timeout_s`.
        """
        folder = self.lease_folder(kind, key)
        with held(
            folder, run=run, flow_run=flow_run, log_folder=log_folder, timeout_s=timeout_s, on_wait=on_wait
        ) as lease:
            yield lease

    def lineage(self, *names: str) -> Iterator[Manifest]:
        """Manifests of artifacts (`kind/key`) and of all that they were made from, each once, nearest first.

        What is no artifact (a folder of the user's own), or is gone, is left out.
        """
        pending, seen = list(names), set()
        while pending:
            name = pending.pop(0)
            if name in seen:
                continue
            seen.add(name)
            kind, _, key = name.partition("/")
            try:
                manifest = Manifest.read(self.path(kind, key))
            except (OSError, ValueError):
                continue
            yield manifest
            pending += manifest.inputs.values()

    def manifests(self) -> Iterator[Manifest]:
        """All artifacts with a readable manifest, their files not checked."""
        for file in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            try:
                manifest = Manifest.read(file.parent)
            except (FileNotFoundError, ValueError):
                continue
            if self.path(manifest.kind, manifest.key) == file.parent:  # not one that is still being made
                yield manifest


def folder_digest(digests: DigestCache, folder: Path, *, patterns: tuple[str, ...] = ("*",)) -> dict[str, str]:
    """SHA-256 of each file directly in a folder that a stage reads, by name."""
    names = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.name: digests.digest(path) for path in sorted(names)}


def publish_link(link: Path, target: Path) -> None:
    """Point a symbolic link at a folder in one step, so that a reader sees the old target or the new one."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = unwritten(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.rename(link)
    fsync_path(link.parent)
