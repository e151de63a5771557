"""Records of runs: written once at the start and once at the end, read whatever became of the run."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mcore.artifacts import Manifest, Store, publish_link
from mcore.folders import unwritten
from mcore.runs import (
    ROOM,
    Failure,
    RunRecord,
    StageRecord,
    begin,
    current,
    end,
    history,
    is_being_made,
    is_under_way,
    judged,
    lineage,
    published,
    read_record,
    records,
    run_names,
)
from mcore.supervise.claims import Work, begin_work
from mcore.supervise.processes import ProcessId

HOLD = """
import sys, time
from mcore.artifacts import Store
with Store(sys.argv[1]).lock(*sys.argv[2:4]):
    print("held", flush=True)
    time.sleep(60)
"""


def record(name: str = "a", **fields: object) -> RunRecord:
    stage = StageRecord("train", "train", "k" * 20, {"base": "convert/c"})
    whole = RunRecord(name, "pipeline", {"name": name}, (stage,), "/somewhere", 1, "2026-11-24T07:00:00.000000+00:00")
    return replace(whole, **fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@contextmanager
def held(store: Store, kind: str, key: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock of the store."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), kind, key], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_record_survives_the_disk(store: Store) -> None:
    ended = record(
        ended="2026-11-24T08:00:00+00:00", state="rejected", outcomes={"train": {"cached": True, "seconds": 0.1}},
        failure=Failure("compare", "compare/x", "EvaluationGateError", "not good enough"),
    )  # fmt: skip
    begin(store, record())
    end(store, ended)
    assert read_record(store, "a") == current(store, "a") == ended
    assert list(records(store)) == [ended] and run_names(store) == ["a"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "a"}', '{"stages": [1], "failure": null}', "null"])
def test_what_is_no_record_is_none(store: Store, text: str) -> None:
    begin(store, record())
    (store.run_dir("a") / "run.json").write_text(text)
    assert read_record(store, "a") is None and list(records(store)) == [] and run_names(store) == ["a"]
    begin(store, record())  # and stops nothing
    assert read_record(store, "a") == record()


def test_attempts_become_history_and_one_that_was_killed_is_lost(store: Store) -> None:
    first = record(started="2026-11-24T01:00:00+00:00")
    begin(store, first)
    end(store, replace(first, state="done", ended="2026-11-24T02:00:00+00:00"))
    begin(store, record(started="2026-11-24T03:00:00+00:00"))  # and is killed
    begin(store, record(started="2026-11-24T05:00:00+00:00"))
    with (store.run_dir("a") / "history.jsonl").open("a") as file:
        file.write('{"name": "a", "flo')  # a crash cut it short
    with held(store, "run", "a"):
        assert [one.state for one in history(store, "a")] == ["done", "lost", "running"]
    assert [one.state for one in history(store, "a")] == ["done", "lost", "lost"]
    assert history(store, "b") == []


def test_what_a_kill_left_of_a_record_or_a_link_goes_when_the_run_starts_again(store: Store) -> None:
    begin(store, record())
    folder = store.run_dir("a")
    unwritten(folder / "run.json").write_text("{")
    unwritten(folder / "model").symlink_to("nowhere")
    begin(store, record())
    assert {path.name for path in folder.iterdir()} == {"run.json", "history.jsonl", ROOM}
    end(store, record(state="done"))
    assert {path.name for path in folder.iterdir()} == {"run.json", "history.jsonl"}


def test_under_way_is_what_holds_the_lock_and_nothing_is_written_to_see_it(store: Store) -> None:
    assert not is_under_way(store, "a") and not is_being_made(store, "train", "k") and not store.root.exists()
    with held(store, "run", "a"), held(store, "train", "k") as maker:
        before = sorted(store.root.rglob("*"))
        assert (
            is_under_way(store, "a") and is_being_made(store, "train", "k") and not is_being_made(store, "train", "l")
        )
        assert sorted(store.root.rglob("*")) == before
        maker.kill()
        maker.wait()
        assert not is_being_made(store, "train", "k")
    assert not is_under_way(store, "a")


def test_processes_of_a_killed_run_that_still_end_count_as_making(store: Store) -> None:
    with held(store, "train", "k") as maker:
        folder = store.lease_folder("train", "k")
        supervisor = subprocess.Popen(["sleep", "60"])
        begin_work(folder, Work(1, ProcessId.of(supervisor.pid), "", "", ""))
        maker.kill()
        maker.wait()
        assert is_being_made(store, "train", "k")
        supervisor.kill()
        supervisor.wait()
        assert not is_being_made(store, "train", "k")


def test_a_run_does_not_start_while_it_is_decided_what_is_needed(store: Store) -> None:
    with held(store, "store", "register") as deciding:
        code = (
            "import sys\nfrom mcore.artifacts import Store\nfrom mcore.runs import RunRecord, begin\n"
            "begin(Store(sys.argv[1]), RunRecord('a', 'pipeline', {}, (), '', 1, ''))"
        )
        starting = subprocess.Popen([sys.executable, "-c", code, str(store.root)])
        time.sleep(1.5)
        assert starting.poll() is None and read_record(store, "a") is None
        deciding.kill()
        assert starting.wait(30) == 0 and read_record(store, "a") is not None


def test_published_is_what_the_link_points_at(store: Store, tmp_path: Path) -> None:
    assert published(store, "a") is None
    publish_link(store.run_dir("a") / "model", store.path("export", "e" * 20))
    assert published(store, "a") == f"export/{'e' * 20}"
    publish_link(store.run_dir("b") / "model", tmp_path / "elsewhere" / "x")
    assert published(store, "b") is None


def test_lineage_and_what_judges_it() -> None:
    def manifest(name: str, **inputs: str) -> Manifest:
        kind, _, key = name.partition("/")
        return Manifest(kind, key, {}, inputs, {}, {}, {}, {}, "", 0.0)

    made = (
        manifest("fetch/f"), manifest("convert/c", hf="fetch/f"), manifest("verify/v", hf="fetch/f", mcore="convert/c"),
        manifest("train/t", base="convert/c", proof="verify/v"), manifest("export/e", trained="train/t"),
        manifest("verify/w", hf="export/e", mcore="train/t"), manifest("evaluate/b", model="fetch/f"),
        manifest("evaluate/t", model="export/e", proof="verify/w"),
        manifest("compare/x", base="evaluate/b", tuned="evaluate/t"),
        manifest("train/other", base="convert/c", proof="verify/v"), manifest("export/other", trained="train/other"),
        manifest("evaluate/other", model="export/other"),
    )  # fmt: skip
    by_name = {f"{one.kind}/{one.key}": one for one in made}
    line = lineage(by_name, "export/e", "export/gone")
    assert line == {"export/e", "train/t", "convert/c", "verify/v", "fetch/f"}
    assert judged(by_name, line) == line | {"verify/w", "evaluate/b", "evaluate/t", "compare/x"}
