"""What a source holds, as it goes into the keys of stages: known before any row is read."""

from __future__ import annotations

from mcore.artifacts import DigestCache, digest_of
from mcore.data.sampling import DatasetSpec
from mcore.data.sources.files import files_of


def content_digest(spec: DatasetSpec, digests: DigestCache) -> str:
    """Digest of what an entry of `data.dataset` names: a file's own, or one of a folder's files and their names.

    Args:
        spec: The entry; how many rows are taken of it does not count.
        digests: Remembers digests of files.

    Raises:
        OSError: A file can't be read.
        DataError: A folder has no files of rows.
    """
    files = files_of(spec.path)
    if files == [spec.path]:
        return digests.digest(spec.path)
    return digest_of({str(file.relative_to(spec.path)): digests.digest(file) for file in files})
