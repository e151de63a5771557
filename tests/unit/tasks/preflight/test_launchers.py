"""A launcher that can't start its machines from here is told before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from configs.schema.launch import LaunchConfig
from tasks.preflight.launchers import launcher_problems

KUBERNETES = {"image": "r/i:1", "volume_claim": "store", "mount_path": "/shared"}


def found(**launch: Any) -> str:
    return "\n".join(map(str, launcher_problems(LaunchConfig.model_validate(launch))))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which all of them are, and a working directory that a job's file takes."""
    for name in ("sbatch", "squeue", "scancel", "scontrol", "kubectl"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_one_machine_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("NODE_RANK", "1")
    assert found() == ""


def test_every_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems = found(launcher="slurm")
    assert all(f"the program {name} on" in problems for name in ("sbatch", "squeue", "scancel", "scontrol"))
    assert "kubectl" in found(launcher="kubernetes", kubernetes=KUBERNETES, store="/shared/store")


def test_the_flow_runs_on_machine_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert "mcore-flows node" in found(nnodes=2, rdzv_endpoint="h:1")
    monkeypatch.setenv("NODE_RANK", "0")
    assert found(nnodes=2, rdzv_endpoint="h:1") == ""


def test_paths_that_go_into_a_jobs_file_are_plain(programs: None) -> None:
    assert found(launcher="slurm") == ""
    assert "launch.store" in found(launcher="slurm", store="/a b/store")


def test_the_store_is_on_the_volume(programs: None) -> None:
    launch = {"launcher": "kubernetes", "kubernetes": KUBERNETES}
    assert "a folder below /shared" in found(**launch, store="/elsewhere/store")
    assert found(**launch, store="/shared/store") == ""
