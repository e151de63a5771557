"""`status`, `logs`, `runs` and `resume`, over stores as runs leave them. No server is there to ask."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.run_logs import Follower, follow
from mcore.folders import remove
from mcore.runs import begin, current, end
from tasks.preflight import CheckedRun
from tests.unit.flows.command_line import COMMAND, mcore_flows
from tests.unit.flows.made_runs import checked_run, commit, finish, record_of
from tests.unit.tasks.model_folders import listing

TRAINED = {"train": {"iterations": 10, "final_loss": 0.51239, "best_validation_loss": 0.75}}


def flows(*arguments: str) -> str:
    """What a command prints that must do well, and write nothing."""
    before = listing(Path.cwd())
    done = mcore_flows(*arguments, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert listing(Path.cwd()) == before, "something was written"
    return done.stdout


def rows(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line) for line in text.splitlines()]


def training(checked: CheckedRun) -> Path:
    """A run that is at its training: record, a finished conversion, a log, five steps of ten."""
    store = checked.store
    begin(store, replace(record_of(checked), pid=os.getpid()))
    plans = {plan.name: plan for plan in checked.stages}
    for name in ("prepare", "convert", "verify_convert"):
        commit(store, plans[name], duration_s=3.0)
    output = store.partial("train", plans["train"].key)
    output.mkdir(parents=True)
    (output / "fingerprint.json").write_text('{"train": {"train_iters": 10}}')
    lines = [{"iteration": n, "loss": 2.0, "tokens_per_s": 1234.5, "step_time_s": 3.0} for n in range(1, 6)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = store.run_dir(checked.run.name) / "train" / "stage.log"
    log.parent.mkdir()
    log.write_text("$ torchrun\nstep 1\nstep 2\n")
    return log


def test_a_run_that_is_under_way(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    training(checked)
    key = next(plan.key for plan in checked.stages if plan.name == "train")
    with checked.store.lock("run", "small"), checked.store.lock("train", key):
        shown = flows("status", "small")
        assert re.match(rf"small: running, started 2026-11-24 07:00 UTC, .*, process {os.getpid()}\n", shown)
        states = {row[0]: row[1:] for row in rows(shown)}
        note = "iteration 5 of 10, loss 2.0000, 1,234 tokens/s, about 15.0 s left"
        assert states["train"] == ["running", f"train/{key[:8]}", note]
        assert states["convert"][:2] == ["made", "3.0 s"] and states["export"][0] == "waiting"
        assert "To watch it: mcore-flows logs small --follow" in shown
        everything = flows("status")
        assert rows(everything)[1][:3] == ["small", "running", "2026-11-24 07:00"]
        assert note in everything and everything.endswith("1 run, 1 under way\n")
        metrics = checked.store.partial("train", key) / "metrics.jsonl"
        long_ago = time.time() - 600
        os.utime(metrics, (long_ago, long_ago))
        assert "left, nothing new for 10 min 0" in flows("status", "small")


def test_a_stage_that_another_run_is_at(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    training(checked)
    key = next(plan.key for plan in checked.stages if plan.name == "train")
    with checked.store.lock("run", "small", run="small"), checked.store.lock("train", key, run="nightly"):
        (row,) = (row for row in rows(flows("status", "small")) if row[0] == "train")
        assert re.search(rf"15\.0 s left, by run nightly \(process {os.getpid()} on \S+\)$", row[-1])


def test_a_killed_run_whose_command_is_still_at_work(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    training(checked)
    key = next(plan.key for plan in checked.stages if plan.name == "train")
    with checked.store.lock("train", key, run="small"):
        (row,) = (row for row in rows(flows("status", "small")) if row[0] == "train")
    assert row[1] == "killed" and row[-1].startswith("its command is still at work")


def test_a_run_that_was_killed(raw: dict[str, Any]) -> None:
    training(checked_run(raw))
    shown = flows("status", "small")
    assert shown.startswith("small: killed, started 2026-11-24 07:00 UTC\n")
    states = {row[0]: row[1] for row in rows(shown) if len(row) > 1}
    assert (states["convert"], states["train"], states["export"]) == ("made", "killed", "not reached")
    assert "To go on: mcore-flows resume small" in shown
    assert flows("status").endswith("1 run, 0 under way\n")


def test_a_run_that_is_done_and_one_that_a_gate_stopped(raw: dict[str, Any]) -> None:
    finish(checked_run(raw))
    finish(checked_run(raw, name="other", train__lr=1.0e-3), "rejected", until="compare")
    shown = flows("status", "small")
    assert shown.startswith("small: done, started 2026-11-24 07:00 UTC, 30 min 00 s\n")
    assert f"model:  {Path.cwd()}/store/runs/small/model" in shown and "resume" not in shown
    other = flows("status", "other")
    states = {row[0]: row[1:] for row in rows(other)}
    assert states["compare"][0] == "gate said no" and states["compare"][-1] == "it went wrong"
    assert states["convert"][0] == "reused" and states["train"][0] == "made"
    assert "resume" not in other  # the gate would say the same
    told = json.loads(flows("status", "--json"))
    assert [(one["name"], one["state"]) for one in told] == [("other", "rejected"), ("small", "done")]
    assert told[1]["published"].startswith("export/") and told[0]["published"] is None
    assert told[0]["failure"]["stage"] == "compare"


def test_what_was_collected_since_is_gone(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    finish(checked)
    plan = next(plan for plan in checked.stages if plan.name == "train")
    remove(checked.store.path(plan.kind, plan.key))
    states = {row[0]: row[1:] for row in rows(flows("status", "small"))}
    assert states["train"][0] == "gone" and states["export"][0] == "made"


def test_a_run_that_is_not_there(raw: dict[str, Any]) -> None:
    finish(checked_run(raw))
    (Path("store") / "runs" / "older").mkdir()
    for command in ("status", "logs", "runs", "resume"):
        done = mcore_flows(command, "none", cwd=Path.cwd())
        assert done.returncode == 2 and "none: expected one of small, found none" in done.stderr
        done = mcore_flows(command, "older", cwd=Path.cwd())
        assert done.returncode == 2 and "found a run without a record, of an earlier version" in done.stderr
    assert flows("status", "--store", "elsewhere").endswith("0 runs, 0 under way\n")


def test_logs(raw: dict[str, Any]) -> None:
    log = training(checked_run(raw))
    assert flows("logs", "small") == "$ torchrun\nstep 1\nstep 2\n"
    assert flows("logs", "small", "train", "--lines", "1") == "step 2\n"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert flows("logs", "small").splitlines() == [f"line {number}" for number in range(60, 100)]
    assert len(flows("logs", "small", "train", "-n", "0").splitlines()) == 100
    done = mcore_flows("logs", "small", "convert", cwd=Path.cwd())
    assert done.returncode == 2 and "expected a log of convert, found train" in done.stderr
    done = mcore_flows("logs", "small", "trian", cwd=Path.cwd())
    assert done.returncode == 2 and "trian: expected one of prepare, convert," in done.stderr


def test_logs_are_followed_from_stage_to_stage_until_the_run_ends(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    log = training(checked)
    with checked.store.lock("run", "small"):
        process = subprocess.Popen(
            [str(COMMAND), "logs", "small", "--follow", "-n", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["── train\n", "step 2\n"]
        with log.open("a") as file:
            file.write("step 3\nstep")
            file.flush()
            assert process.stdout.readline() == "step 3\n"
            file.write(" 4\n")
        assert process.stdout.readline() == "step 4\n"
        log.unlink()
        log.write_text("another attempt\n")
        assert process.stdout.readline() == "another attempt\n"
        following = log.parent.parent / "export" / "stage.log"
        following.parent.mkdir()
        following.write_text("exporting\nto the end")
        assert [process.stdout.readline() for _ in range(2)] == ["── export\n", "exporting\n"]
        assert process.poll() is None
    assert process.stdout.read() == "to the end\n" and process.wait(30) == 0


def test_following_a_run_that_is_over_shows_what_there_is(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    training(checked)
    record = current(checked.store, "small")
    assert record is not None
    assert list(follow(checked.store, record, None, None)) == [
        ("train", "$ torchrun"), ("train", "step 1"), ("train", "step 2"),
    ]  # fmt: skip
    assert list(follow(checked.store, record, "export", None)) == []


def test_a_log_that_is_empty_at_first_loses_nothing(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    reader = Follower(log, 1)
    assert reader.read() == []
    log.touch()
    assert reader.read() == []
    log.write_text("a\nb\nc\n")
    assert reader.read() == ["a", "b", "c"] and reader.read() == []


def test_runs_are_listed_and_attempts_of_one(raw: dict[str, Any]) -> None:
    finish(checked_run(raw), metrics=TRAINED)
    finish(checked_run(raw, name="other"), "failed", until="convert")
    finish(checked_run(raw, train__lr=1.0e-3))
    listed = rows(flows("runs"))
    assert listed[0] == ["run", "state", "started (UTC)", "took", "base model"]  # figures of the newest attempts
    assert [row[:2] for row in listed[1:3]] == [["other", "failed"], ["small", "done"]] and listed[3] == ["2 runs"]
    attempts = rows(flows("runs", "small"))
    assert attempts[0][5:] == ["iterations", "final loss", "best validation loss"]
    assert attempts[1][5:] == ["10", "0.5124", "0.75"] and attempts[-1] == ["2 attempts"]
    told = json.loads(flows("runs", "small", "--json"))
    assert [one["config"]["train"]["lr"] for one in told] == [1e-05, 1e-03]
    assert told[0]["figures"] == {"iterations": 10, "final loss": 0.51239, "best validation loss": 0.75}


def test_runs_are_compared(raw: dict[str, Any]) -> None:
    finish(checked_run(raw), metrics=TRAINED)
    finish(
        checked_run(raw, name="other", train__lr=1.0e-3, data__system="Be brief."),
        metrics={"train": {"iterations": 10, "final_loss": 0.25}, "compare": {"tuned_pass_rate": 1.0}},
    )
    shown = rows(flows("runs", "small", "other"))
    assert shown[0] == ["", "small", "other"] and ["final loss", "0.5124", "0.25"] in shown
    assert ["train.lr", "1e-05", "0.001"] in shown and ["data.system", "null", "Be brief."] in shown
    settings = shown[shown.index(["setting", "small", "other"]) + 1 :]
    assert [row[0] for row in settings] == ["data.system", "train.lr"]
    told = json.loads(flows("runs", "small", "other", "--json"))
    assert told["runs"] == ["small", "other"] and told["config"]["train.lr"] == [1e-05, 1e-03]
    assert told["figures"]["pass rate of tuned"] == [None, 1.0]
    finish(checked_run(raw, name="same"))
    assert "Their settings are the same." in flows("runs", "small", "same")


def test_what_can_not_be_resumed(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    training(checked)
    with checked.store.lock("run", "small"):
        done = mcore_flows("resume", "small", cwd=Path.cwd())
    assert done.returncode == 2 and f"small: expected a run that has ended, found process {os.getpid()} at it" in (
        done.stderr
    )
    record = current(checked.store, "small")
    assert record is not None
    end(checked.store, replace(record, flow="convert-only", folder="/nowhere/at/all", state="failed"))
    done = mcore_flows("resume", "small", cwd=Path.cwd())
    assert done.returncode == 2 and "small: expected a run of the flow pipeline, found convert-only" in done.stderr
    assert "/nowhere/at/all: expected the folder that the run was started in, found none" in done.stderr


def test_a_stage_that_the_run_has_not_can_not_be_made_again(raw: dict[str, Any]) -> None:
    finish(checked_run(raw))
    before = listing(Path.cwd())
    done = mcore_flows("resume", "small", "--from", "publish", cwd=Path.cwd())
    assert (
        done.returncode == 2 and "--from publish: expected a stage of the run: one of prepare, convert," in done.stderr
    )
    assert listing(Path.cwd()) == before


def test_what_became_wrong_since_is_told_before_anything_starts(raw: dict[str, Any]) -> None:
    training(checked_run(raw))
    Path("rows.jsonl").unlink()
    elsewhere = Path.cwd() / "elsewhere"
    elsewhere.mkdir()
    done = mcore_flows("resume", "small", "--store", "../store", cwd=elsewhere)
    assert done.returncode == 2 and "rows.jsonl: expected a jsonl file, found No such file" in done.stderr


def test_nothing_heavy_is_imported_to_look(raw: dict[str, Any]) -> None:
    finish(checked_run(raw))
    code = (
        "import sys\nfrom flows.cli import app\n"
        "for words in (['status'], ['status', 'small'], ['runs'], ['runs', 'small', 'small']):\n"
        "    app(words, standalone_mode=False)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'prefect', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done
