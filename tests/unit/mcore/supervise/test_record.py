"""The record of an execution says what it is, while it lives and behind its end."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from mcore.supervise.processes import ProcessId
from mcore.supervise.record import LOST_AFTER_S, Record, read_record


def record(pid: int) -> Record:
    now = time.time()
    return Record(("sleep", "60"), "log", 7, ProcessId.of(pid), "host", started=now, heartbeat=now)


def test_it_survives_its_file(tmp_path: Path) -> None:
    written = replace(record(os.getpid()), cause="timeout", status=143, stacks="stacks")
    written.write(tmp_path / "process.json")
    assert read_record(tmp_path / "process.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["process.json"]


def test_what_is_none_is_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path / "absent") is None
    for text in ("", "[]", "{}", '{"supervisor": {}}', '{"supervisor": 3, "command": []}'):
        (tmp_path / "file").write_text(text)
        assert read_record(tmp_path / "file") is None


def test_it_is_alive_while_its_supervisor_is() -> None:
    process = subprocess.Popen(["sleep", "60"])
    alive = record(process.pid)
    assert alive.is_alive() and not replace(alive, status=0).is_alive()
    process.kill()
    process.wait()
    assert not alive.is_alive()


def test_of_another_machine_signs_of_life_count() -> None:
    alive = record(os.getpid())
    elsewhere = replace(alive, supervisor=replace(alive.supervisor, machine="another", pid=1))
    assert elsewhere.is_alive()
    assert not replace(elsewhere, heartbeat=time.time() - LOST_AFTER_S - 1).is_alive()
