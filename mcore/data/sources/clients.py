"""What the hubs' real clients say of a data set, and the download of its files of rows.

Which files belong to a subset and a split is what Hugging Face's `datasets` makes of the repository's README and of its
files' names; it is shown a folder of empty files of these names, so that nothing is downloaded that is not wanted, and
code in a repository is never run. Tokens and proxies are the clients' own business (`HF_TOKEN`,
`MODELSCOPE_API_TOKEN`, `HTTPS_PROXY`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mcore.data.sources.files import NO_ROWS, suffix_kind
from mcore.data.sources.hub import FILES, INDEX_FILE
from mcore.data.sources.names import HubDataset
from mcore.data.sources.self_cognition import repository_subset
from mcore.errors import DataError, Problem
from mcore.sources.hub_errors import found_and_fix

README = "README.md"
MAX_TOLD = 500
"""Letters of an error of `datasets` that are shown; it lists all subsets."""


def locate(dataset: HubDataset) -> dict[str, Any]:
    """The `commit` of a data set's revision, and the `files` of each of its subsets.

    Raises:
        DataError: The hub can't be reached, or has no such data set, revision, subset or split; says what to do.
    """
    with _typed(dataset), tempfile.TemporaryDirectory() as temporary:
        commit, names = _listing(dataset)
        folder = Path(temporary) / "repository"
        folder.mkdir()
        for name in names:
            if _is_inside(name) and suffix_kind(Path(name)) and PurePosixPath(name).name not in NO_ROWS:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        if README in names:
            _download(dataset, commit, README, folder)
        subsets = dataset.subsets or ("",)
        return {"commit": commit, "files": {subset: _files(dataset, subset, folder) for subset in subsets}}


def fetch(dataset: HubDataset, commit: str, output: Path) -> None:
    """Put the files of rows into a folder.

    Args:
        dataset: A data set.
        commit: What `locate` said of it.
        output: A folder with nothing but the list of the files, as `locate` gave it.

    Raises:
        DataError: As `locate`; or the data set has changed since.
    """
    index: dict[str, list[str]] = json.loads((output / INDEX_FILE).read_text())
    with _typed(dataset):
        for name in sorted({name for names in index.values() for name in names}):
            _download(dataset, commit, name, output / FILES)
        if (now := _listing(dataset)[0]) != commit:
            raise _refused(dataset, f"{commit}, as it was when it was asked about", now, "Start again.")


def _files(dataset: HubDataset, subset: str, folder: Path) -> list[str]:
    """The files of a subset's split, in their order."""
    from datasets import DownloadConfig, load_dataset_builder

    name = repository_subset(dataset.repo, subset) or None
    try:
        config = load_dataset_builder(
            str(folder), name=name, cache_dir=str(folder.parent / "cache"), download_config=DownloadConfig()
        ).config
    except Exception as exc:  # datasets has no error tree
        # Which subsets there are is said behind the first line.
        told = " ".join(str(exc).replace(str(folder), dataset.repo).split())[:MAX_TOLD]
        raise _refused(dataset, "a subset with files of rows", f"{type(exc).__name__}: {told}", "") from exc
    splits = {str(split): [str(file) for file in files] for split, files in (config.data_files or {}).items()}
    if dataset.split not in splits:
        fix = "Name one behind a second colon: org/name:subset:split, or org/name::split."
        raise _refused(dataset, f"the split {dataset.split!r}", ", ".join(splits) or "none", fix)
    return [str(Path(file).relative_to(folder.resolve())) for file in splits[dataset.split]]


def _listing(dataset: HubDataset) -> tuple[str, list[str]]:
    """The commit, and the names of all files."""
    if dataset.hub == "hf":
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(dataset.repo, revision=dataset.revision)
        assert info.sha
        return info.sha, [file.rfilename for file in info.siblings or ()]
    from modelscope_hub import HubApi

    found = HubApi().list_repo_files(dataset.repo, "dataset", revision=dataset.revision)
    files = [file for file in found if file.type == "blob"]
    lines = sorted(f"{file.path} {file.sha256 or file.blob_id}" for file in files)
    if not lines or any(line.endswith(" None") for line in lines):
        raise _refused(dataset, "a digest of each file, said by the hub", f"{len(lines)} files", "")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40], [file.path for file in files]


def _download(dataset: HubDataset, commit: str, name: str, folder: Path) -> None:
    if dataset.hub == "hf":
        from huggingface_hub import hf_hub_download

        hf_hub_download(dataset.repo, name, repo_type="dataset", revision=commit, local_dir=folder)
        return
    from modelscope_hub import HubApi

    HubApi().download_file(dataset.repo, "dataset", name, revision=dataset.revision, local_dir=folder)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and not any(part.startswith(".") for part in path.parts)


def _refused(dataset: HubDataset, expected: str, found: str, fix: str) -> DataError:
    return DataError("the data can't be used", [Problem(str(dataset), expected, found, fix)])


@contextmanager
def _typed(dataset: HubDataset) -> Iterator[None]:
    """Turn whatever the clients raise into a DataError that says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as exc:
        spelling = "Check the spelling; data sets without hf: that are no file here are looked for on ModelScope."
        raise _refused(dataset, "a data set of the hub", *found_and_fix(exc, "data set", spelling)) from exc
