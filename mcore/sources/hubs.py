"""The two model hubs: which commit a revision is, what the model's config says, and the download.

Only safetensors and small text files are downloaded; pickled weights and code never are. Tokens and proxies are the
clients' own business (`HF_TOKEN`, `MODELSCOPE_API_TOKEN`, `HTTPS_PROXY`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mcore.errors import Problem, SourceError
from mcore.progress import progress
from mcore.sources.hub_errors import found_and_fix
from mcore.sources.resolve import HUB_SOURCE

PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
DEFAULT_BRANCH = {"hf": "main", "ms": "master"}
IGNORED = ("original/*", "consolidated*", "onnx/*", "*.bin.index.json")
"""Further copies of the weights that some repositories hold."""
POLL_S = 1.0


def locate(source: str) -> dict[str, Any]:
    """The `commit` of a hub source and the model's `config`.

    Raises:
        SourceError: The hub can't be reached, or has no such model or revision; says what to do.
    """
    hub, repo, revision = _parts(source)
    with _typed(source):
        commit = _hf_commit(repo, revision) if hub == "hf" else _ms_commit(repo, revision)
        with tempfile.TemporaryDirectory() as folder:
            path = _file(hub, repo, commit if hub == "hf" else revision, "config.json", Path(folder))
            config = json.loads(path.read_text())
    return {"commit": commit, "config": config}


def download(source: str, commit: str, folder: Path) -> None:
    """Put the model's files into a folder.

    Args:
        source: A hub source.
        commit: What `locate` said of it.
        folder: Where the files go.

    Raises:
        SourceError: As `locate`; or ModelScope's files changed meanwhile.
    """
    hub, repo, revision = _parts(source)
    filters: dict[str, Any] = {"allow_patterns": list(PATTERNS), "ignore_patterns": list(IGNORED)}
    with _typed(source):
        if hub == "hf":
            from huggingface_hub import HfApi, snapshot_download

            info = HfApi().model_info(repo, revision=commit, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            with _progress(folder, sizes):
                snapshot_download(repo, revision=commit, local_dir=folder, **filters)
        else:
            from modelscope import snapshot_download as ms_snapshot_download
            from modelscope_hub import HubApi

            sizes = {file.path: file.size for file in HubApi().list_repo_files(repo, "model", revision=revision)}
            with _progress(folder, sizes):
                ms_snapshot_download(repo, revision=revision, local_dir=str(folder), **filters)
            if (now := _ms_commit(repo, revision)) != commit:
                raise changed(source, commit, now)
    # Notes of the clients about what they downloaded.
    for notes in (folder / ".cache", folder / "._____temp", folder / ".msc", folder / ".mv"):
        if notes.is_dir():
            shutil.rmtree(notes)
        else:
            notes.unlink(missing_ok=True)


@contextmanager
def _progress(folder: Path, sizes: Mapping[str, int]) -> Iterator[None]:
    """Show how much of the files that are wanted has arrived. The clients' own bars do not suit a log file."""
    wanted = sum(
        size
        for name, size in sizes.items()
        if any(fnmatch(name, pattern) for pattern in PATTERNS) and not any(fnmatch(name, no) for no in IGNORED)
    )
    total_mb = max(1, round(wanted / 1e6))
    shown_mb = 0
    done = threading.Event()
    with progress("fetch", total_mb, "MB") as advance:

        def watch() -> None:
            nonlocal shown_mb
            while not done.wait(POLL_S):
                arrived_mb = min(total_mb, round(_bytes_in(folder) / 1e6))
                if arrived_mb > shown_mb:
                    advance(arrived_mb - shown_mb)
                    shown_mb = arrived_mb

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        advance(total_mb - shown_mb)


def _bytes_in(folder: Path) -> int:
    num_bytes = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # renamed or removed meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def _parts(source: str) -> tuple[str, str, str]:
    match = HUB_SOURCE.fullmatch(source)
    if not match:
        raise SourceError("that is no source of a hub", [Problem(source, "hf:org/name[@revision] or ms:…")])
    return match["hub"], match["repo"], match["revision"] or DEFAULT_BRANCH[match["hub"]]


def _hf_commit(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    commit = HfApi().model_info(repo, revision=revision).sha
    assert commit
    return commit


def changed(source: str, expected: str, found: str) -> SourceError:
    """A source is no longer what it was when it was asked about."""
    return SourceError(
        "the model has changed at its source", [Problem(source, expected, found, "Start again with the new one.")]
    )


def _ms_commit(repo: str, revision: str) -> str:
    """ModelScope tells no commit of a branch, but a digest of each file: the digest of these stands for the commit."""
    from modelscope_hub import HubApi

    found = HubApi().list_repo_files(repo, "model", revision=revision)
    lines = sorted(f"{file.path} {file.sha256 or file.blob_id}" for file in found if file.type == "blob")
    if not lines or any(line.endswith(" None") for line in lines):
        raise SourceError("the hub does not say what the model's files hold", [Problem(repo, "a digest of each file")])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


def _file(hub: str, repo: str, revision: str, name: str, folder: Path) -> Path:
    if hub == "hf":
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name, revision=revision, local_dir=folder))
    from modelscope_hub import HubApi

    return Path(HubApi().download_file(repo, "model", name, revision=revision, local_dir=folder))


@contextmanager
def _typed(source: str) -> Iterator[None]:
    """Turn whatever the clients raise into a SourceError that says what to do."""
    try:
        yield
    except SourceError:
        raise
    except Exception as exc:
        found, fix = found_and_fix(exc, "model", "Check the spelling of organisation, name and revision.")
        raise SourceError("the model can't be fetched", [Problem(source, found=found, fix=fix)]) from exc
