"""The hubs' real clients, against a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import SourceError, error_from_json
from mcore.sources.resolve import resolve
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.unit.mcore.sources.loopback_hub import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_WANTED = ("pytorch_model.bin", "modeling_tiny.py", "original/consolidated.00.pth", "README.md")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A repository with one commit on its main and master branches, and what was asked of it."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "org" / "tiny" / COMMIT
    write_hf_folder(folder, "llama", max_shard_size="100KB")
    for name in NOT_WANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not wanted")
    for branch in ("main", "master"):
        (root / "org" / "tiny" / f"{branch}.branch").write_text(COMMIT)
    with hub(root) as (address, asked):
        yield folder, address, asked


@pytest.fixture
def environment(served, tmp_path, monkeypatch):
    """Clients that know no hub but the one on loopback, and no cache but an empty one."""
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", served[1])
    monkeypatch.setenv("MODELSCOPE_DOMAIN", served[1])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms-cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
    resolve.__globals__["locate"].cache_clear()


def fetch(source: str, output: Path, error_file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcore.sources", "fetch", source, "--output", str(output), *options],
        capture_output=True,
        text=True,
        env=os.environ | {ERROR_FILE_VARIABLE: str(error_file)},
    )


@pytest.mark.parametrize("source", ["hf:org/tiny", "ms:org/tiny"])
def test_what_is_fetched_is_the_model_and_no_pickle_or_code(served, environment, tmp_path, source):
    folder, _, asked = served
    asked.clear()
    done = fetch(source, tmp_path / "out", tmp_path / "error.json")
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights_of(tmp_path / "out"), weights_of(folder))
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - set(NOT_WANTED)
    assert found == wanted | {"metrics.json"}
    assert not set(NOT_WANTED) & set(asked)
    assert "fetch: 1/1 MB" in done.stderr


@pytest.mark.parametrize("source", ["hf:org/tiny", "hf:org/tiny@main", "ms:org/tiny"])
def test_a_branch_becomes_a_commit_and_the_config_is_known_beforehand(served, environment, source):
    resolved = resolve(source)
    assert (resolved.kind, resolved.path) == (source[:2], None)
    commit = resolved.identity.removeprefix(f"{source[:2]}:org/tiny@")
    assert commit == COMMIT if source.startswith("hf") else len(commit) == 40
    assert resolved.hf_config() == json.loads((served[0] / "config.json").read_text())


@pytest.mark.parametrize("hub_name", ["hf", "ms"])
def test_a_planned_model_is_fetched_as_planned_or_not_at_all(served, environment, tmp_path, hub_name):
    """With the arguments that the flow's stage hands on; the branch moves between plan and fetch."""
    folder = served[0]
    later = folder.with_name("f" * 40)
    branch = folder.with_name(f"{hub_name}-moving.branch")
    branch.write_text(COMMIT)
    shutil.copytree(folder, later)
    (later / "config.json").write_text((later / "config.json").read_text() + "\n")
    try:
        planned = resolve(f"{hub_name}:org/tiny@{branch.stem}")
        expect = ("--expect", planned.identity)
        done = fetch(planned.pinned, tmp_path / "out", tmp_path / "error.json", *expect)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["source"] == planned.identity
        branch.write_text(later.name)
        done = fetch(planned.pinned, tmp_path / "late", tmp_path / "error.json", *expect)
    finally:
        shutil.rmtree(later)
        branch.unlink()
    if hub_name == "hf":
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "late" / "config.json").read_text() == (folder / "config.json").read_text()
    else:
        error = error_from_json((tmp_path / "error.json").read_text())
        assert done.returncode == 2 and isinstance(error, SourceError) and planned.identity in str(error)
        assert not (tmp_path / "late").exists()


def test_a_modelscope_revision_that_looks_like_a_commit_is_asked_about(environment):
    assert resolve(f"ms:org/tiny@{COMMIT}").identity == resolve("ms:org/tiny").identity
    with pytest.raises(SourceError, match="spelling"):
        resolve(f"ms:org/tiny@{'0' * 40}")


@pytest.mark.parametrize("source", ["hf:org/nothing", "ms:org/nothing"])
def test_a_model_that_is_not_there(environment, source):
    with pytest.raises(SourceError, match="spelling"):
        resolve(source)


@pytest.mark.parametrize("source", ["hf:org/tiny", "ms:org/tiny"])
def test_a_hub_that_does_not_answer(environment, monkeypatch, tmp_path, source):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="Check the network"):
        resolve(source)


def test_a_model_that_arrives_cut_short_does_not_appear(served, environment, tmp_path):
    file = next(iter(sorted(served[0].glob("*.safetensors"))))
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    try:
        done = fetch("hf:org/tiny", tmp_path / "out", tmp_path / "error.json")
    finally:
        file.write_bytes(whole)
    error = error_from_json((tmp_path / "error.json").read_text())
    assert done.returncode == 2 and isinstance(error, SourceError) and "cut short" in str(error)
    assert not (tmp_path / "out").exists()
