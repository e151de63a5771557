"""What a source holds, as it goes into the keys of stages: known before any row is read."""

from __future__ import annotations

from dataclasses import replace

from mcore.artifacts import DigestCache, digest_of
from mcore.data.sampling import DatasetSpec, parse_spec
from mcore.data.sources.files import files_of
from mcore.data.sources.hub import commit_of, identity


def pinned(entry: str) -> str:
    """An entry of `data.dataset` that stays this content while a branch moves on, where there is one.

    A file's entry, and one of ModelScope, which can't be asked for a commit, are given back as they are.

    Raises:
        DataError: A hub can't be reached.
    """
    spec = parse_spec(entry)
    if isinstance(spec, str) or spec.hub is None or spec.hub.hub != "hf":
        return entry
    count = "" if spec.num_rows is None else f"#{spec.num_rows}"
    return f"{replace(spec.hub, revision=commit_of(spec.hub))}{count}"


def content_digest(spec: DatasetSpec, digests: DigestCache) -> str:
    """What an entry of `data.dataset` names: a file's digest, one of a folder's files and their names, a hub's commit.

    Args:
        spec: The entry; how many rows are taken of it does not count.
        digests: Remembers digests of files.

    Raises:
        OSError: A file can't be read.
        DataError: A folder has no files of rows, or a hub can't be reached.
    """
    if spec.hub is not None:
        return identity(spec.hub)
    files = files_of(spec.path)
    if files == [spec.path]:
        return digests.digest(spec.path)
    return digest_of({str(file.relative_to(spec.path)): digests.digest(file) for file in files})
