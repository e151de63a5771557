"""Whether there is something new since a run last went well, told by keys and digests alone."""

import os
from pathlib import Path
from typing import Any

import pytest

from configs.schema.run import RunConfig
from flows.last_success import Verdict, last_success, of_this_code, verdict
from mcore.artifacts import Store
from tasks.preflight import check_run
from tests.flows.workspace import VLLM_PYTHON
from tests.unit.flows.made_runs import checked_run, finish


def asked(raw: dict[str, Any], **changes: Any) -> Verdict:
    return verdict(checked_run(raw, **changes))


@pytest.fixture
def rows(raw: dict[str, Any]) -> Path:
    return Path(raw["data"]["dataset"][0].partition("#")[0])


def test_a_run_that_never_went_well_is_due(raw: dict[str, Any]) -> None:
    assert asked(raw) == Verdict(True, "no run named small has gone well yet")
    finish(checked_run(raw), "failed", until="train")
    assert asked(raw) == Verdict(True, "no run named small has gone well yet")


def test_an_unchanged_run_has_nothing_to_do_however_old_its_files_are(raw: dict[str, Any], rows: Path) -> None:
    finish(checked_run(raw))
    rows.write_bytes(rows.read_bytes())  # another time, the same bytes
    found = asked(raw)
    assert not found.is_due
    assert found.why.startswith("nothing has changed since the run of 2026-11-24 07:00 UTC: data, settings, model and")
    finish(checked_run(raw), "cancelled", until="train")
    assert not asked(raw).is_due  # what was tried since counts for nothing


def test_new_rows_are_the_reason_even_with_the_time_of_the_old_ones(raw: dict[str, Any], rows: Path) -> None:
    first = checked_run(raw)
    finish(first)
    old = rows.read_text()
    stat = rows.stat()
    rows.write_text(old + old.splitlines()[0] + "\n")
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = asked(raw)
    assert found.is_due
    assert found.why.startswith("changed since the run of 2026-11-24 07:00 UTC: prepare: data.dataset: other files, or")
    finish(checked_run(raw))
    assert not asked(raw).is_due
    rows.write_text(old)
    assert asked(raw).why.endswith("back to what was made before that")


def test_what_was_lost_since_is_a_reason(raw: dict[str, Any]) -> None:
    checked = checked_run(raw)
    finish(checked)
    export = next(plan for plan in checked.stages if plan.name == "export")
    (checked.store.path(export.kind, export.key) / "file").write_text("damaged")
    found = asked(raw)
    assert found.is_due and f"artifacts were lost since the run of 2026-11-24 07:00 UTC: {export.artifact}" in found.why


def test_the_code_is_in_the_key_of_everything_but_what_is_fetched(raw: dict[str, Any]) -> None:
    raw["evaluate"]["python"] = str(VLLM_PYTHON)
    run = of_this_code(RunConfig.model_validate(raw))
    word = run.launch.again["convert"]
    assert run.launch.again == dict.fromkeys(("prepare", "convert", "evaluate_base"), word) and word.startswith("code ")
    assert of_this_code(RunConfig.model_validate(raw)) == run
    plain, coded = check_run(raw), check_run(run)
    assert all(one.key != other.key for one, other in zip(plain.stages, coded.stages, strict=True))
    finish(coded)
    assert not verdict(coded).is_due
    other = run.launch.model_dump() | {"again": dict.fromkeys(("prepare", "convert", "evaluate_base"), "code 1")}
    found = verdict(check_run(run.model_dump() | {"launch": other}))
    assert found.is_due and "prepare: launch.again: code 1" in found.why
    record = last_success(Store("store"), "small")
    assert record is not None and record.config["launch"]["again"] == dict.fromkeys(
        ("prepare", "convert", "evaluate_base"), word
    )


def test_a_word_that_is_given_stays_beside_the_code(raw: dict[str, Any]) -> None:
    raw["evaluate"]["python"] = str(VLLM_PYTHON)
    raw["launch"] = {"again": {"convert": "once more", "train": "too"}}
    again = of_this_code(RunConfig.model_validate(raw)).launch.again
    assert again["convert"] == f"{again['evaluate_base']} once more" and again["train"] == "too"
