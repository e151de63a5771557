"""A release: an exported model with its card, in a folder that vLLM and transformers load, and what it rests on.

The weights are links into the artifact, as in a hub's own cache: artifacts never change, and the card, which tells of
evaluation, can't be in one that was made before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mcore.artifacts import RECORDS, Manifest, Store, digest_of
from mcore.errors import ArtifactError, Problem
from mcore.folders import fsync_folder, fsync_path, remove, write_durably

RELEASE = "release.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Release:
    """A model that was promoted, and on what grounds.

    Attributes:
        model: Name in the registry.
        artifact: `export/key` of the exported model or adapter.
        content: Digest of what it held (`Manifest.content`).
        base_proof: `verify/key` of the proof that the converted base is the base.
        proof: `verify/key` of the proof that the export is the checkpoint.
        comparison: `compare/key` of base against tuned.
        card_sha256: Digest of the card.
    """

    model: str
    artifact: str
    content: str
    base_proof: str
    proof: str
    comparison: str
    card_sha256: str

    @property
    def id(self) -> str:
        """Name of its folder: the same model on the same grounds with the same card is the same release."""
        return digest_of(asdict(self))

    @property
    def needs(self) -> tuple[str, ...]:
        """Artifacts that it names, `kind/key`."""
        return (self.artifact, self.base_proof, self.proof, self.comparison)

    @classmethod
    def read(cls, folder: Path) -> Release:
        """The release in a folder.

        Raises:
            ValueError: There is none, or it was changed.
        """
        try:
            release = cls(**json.loads((folder / RELEASE).read_text()))
        except (OSError, TypeError, ValueError) as exc:
            raise ValueError(f"{RELEASE} can't be read: {exc!r}") from exc
        if release.id != folder.name:
            raise ValueError(f"{RELEASE} changed since it was made")
        return release


def card_digest(card: str) -> str:
    """Digest of a card's text."""
    return hashlib.sha256(card.encode()).hexdigest()


def make_release(store: Store, folder: Path, release: Release, card: str) -> None:
    """Make a release's folder, whole or not at all. One that is there and whole is left as it is.

    The caller holds the registry's lock.
    """
    if folder.exists() and not release_problems(store, folder):
        return
    partial = folder.with_name(f".{folder.name}")
    remove(partial)
    partial.mkdir(parents=True)
    for name, target in _links(store, release).items():
        link = partial / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, (folder / name).parent))
    write_durably(partial / CARD, card)
    write_durably(partial / RELEASE, json.dumps(asdict(release), indent=2) + "\n")
    fsync_folder(partial, files=False)
    remove(folder)  # damaged
    partial.rename(folder)
    fsync_path(folder.parent)


def release_problems(store: Store, folder: Path, *, fresh: bool = False) -> list[Problem]:
    """Everything that is wrong with a release and the model that it links to.

    Args:
        store: The store.
        folder: The release's folder.
        fresh: Read every file of the model, also those that seem unchanged.
    """
    try:
        release = Release.read(folder)
    except ValueError as exc:
        return [Problem(str(folder), "a release", str(exc))]
    kind, _, key = release.artifact.partition("/")
    status = store.status(kind, key, fresh=fresh)
    if status.manifest is None:
        return [Problem(release.artifact, "a whole artifact", status.why)]
    if status.manifest.content != release.content:
        return [Problem(release.artifact, "the content that was promoted", "another: it was made again since")]
    problems = []
    for name, target in _links(store, release).items():
        link = folder / name
        if not link.is_symlink() or link.resolve() != target.resolve():
            problems.append(Problem(str(link), f"a link to {target}", "none"))
    try:
        text = (folder / CARD).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        return [*problems, Problem(str(folder / CARD), "the model's card", str(exc))]
    if card_digest(text) != release.card_sha256:
        problems.append(Problem(str(folder / CARD), "the card that was written", "another text"))
    return problems


def _links(store: Store, release: Release) -> dict[str, Path]:
    """What is in the folder beside the card: by name the artifact's file, but for records of how it was made."""
    kind, _, key = release.artifact.partition("/")
    folder = store.path(kind, key)
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError) as exc:
        raise ArtifactError("a model can't be released", [Problem(release.artifact, "an artifact", str(exc))]) from exc
    names = [name for name in manifest.files if not name.startswith(RECORDS) and name not in (CARD, RELEASE)]
    return {name: folder / name for name in names}
