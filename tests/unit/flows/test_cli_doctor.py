"""What the doctor says of this machine, and of ones that are wrong somewhere."""

import json
import os
import sys
from pathlib import Path

import pytest

from flows.doctor.machine import machine_findings
from flows.doctor.software import software_findings
from flows.doctor.store import store_findings
from tests.unit.flows.command_line import mcore_flows


@pytest.mark.long
def test_a_whole_look(tmp_path: Path) -> None:
    """Everything but vLLM, whose import would take long: an interpreter that has none stands for its environment."""
    python = ["--python", sys.executable]
    done = mcore_flows("doctor", "--json", *python, "--device-locks", tmp_path / "locks", cwd=tmp_path, home=tmp_path)
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said["ok"] is False, done.stderr
    found = {finding["subject"]: finding for area in said["areas"].values() for finding in area}
    failed = [finding["subject"] for finding in found.values() if finding["state"] == "fail"]
    assert failed == ["vLLM"] and "expected vLLM in its environment" in found["vLLM"]["found"]
    assert list(said["areas"]) == ["software", "machine", "store", "Prefect"]
    for subject in ("subreaper", "parent-death signal", "gloo", "locale", "prefect", "fastapi", "packages"):
        assert found[subject]["state"] == "ok", found[subject]
    assert found["server"]["state"] == "warn" and "each run brings its own" in found["server"]["found"]
    assert all(finding["fix"] for finding in found.values() if finding["state"] != "ok")
    assert {path.name for path in tmp_path.iterdir()} <= {"locks", ".prefect", ".cache"}, "nothing stays"


def test_a_server_that_does_not_answer_fails(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    from flows.doctor.prefect_server import prefect_findings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 12}):
        found = {finding.subject: finding for finding in prefect_findings()}
    assert found["PREFECT_CLIENT_MAX_RETRIES"].state == "ok"
    assert found["server"].state == "fail" and "does not answer" in found["server"].found


def test_the_store_is_tried_and_nothing_stays(tmp_path: Path) -> None:
    found = {finding.subject.rpartition(": ")[2]: finding for finding in store_findings(tmp_path / "not" / "yet")}
    assert {finding.state for finding in found.values()} <= {"ok", "warn"}
    assert {"rename", "folders", "hard links", "clock", "room"} <= set(found)
    assert list(tmp_path.iterdir()) == []
    (finding,) = store_findings(Path("/proc/self"))
    assert finding.state == "fail" and finding.fix


def test_a_package_out_of_range_fails(monkeypatch, tmp_path: Path) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.165.0" if name == "fastapi" else real(name))
    found = {finding.subject: finding for finding in software_findings(tmp_path / "no-python")}
    assert found["fastapi"].state == "fail" and "<0.151" in found["fastapi"].fix
    assert found["packages"].state == "fail" and found["prefect"].state == "ok"
    assert found["vLLM"].state == "fail"


def test_a_gpu_that_others_use_and_a_torch_that_can_not_are_told(monkeypatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '0, GPU-00000000, 81559, 50000, 470.1, H100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = {finding.subject: finding for finding in machine_findings(tmp_path / "locks")}
    assert found["GPU 0"].state == "warn" and "without a lease" in found["GPU 0"].fix
    assert found["torch"].state == "fail" and "a build without" in found["torch"].found
