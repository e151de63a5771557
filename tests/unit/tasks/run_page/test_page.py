"""The HTML page of a run: everything from the store, everything escaped, for runs that ended well or badly."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mcore.artifacts import Store
from mcore.runs import RunRecord
from tasks.run_page.facts import RunFacts
from tasks.run_page.page import page_of, write_page
from tests.unit.tasks.run_page.made_store import HOSTILE, commit, make_run, verify_report

ENDED = "2126-11-24T07:30:00+00:00"


class Reader(HTMLParser):
    """Tags, attributes and text of a page; void elements aside, what is opened must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def read(store: Store, record: RunRecord) -> Reader:
    return Reader(page_of(RunFacts(store, record)))


def test_a_run_that_is_done_has_all_parts(store: Store) -> None:
    page = read(store, make_run(store, "done"))
    for part in ("Stages", "Cost", "Data", "Training", "Proofs", "Base against tuned", "Lineage", "Settings"):
        assert part in page.texts
    assert page.tags.count("svg") == 6  # loss, speed, gradient, rate; lengths; one proof
    assert page.tags.count("title") > 6 and ("lang", "en") in page.attributes
    assert "to training 0.1667, validation 0.4321." in page.text
    assert "verify_convert fp32 logits of both models over 1 prompts, on cpu 2e-06 0.0001 passed" in page.text
    assert "layers.0.attention 3.7e-07 0.0001 passed" in page.text
    assert "noise of bfloat16, megatron-core over transformers 1.25 1.5 passed" in page.text
    assert "identity (must not be forgotten) 12 1 11 +10 +21.0 to +98.0 1 11" in page.text
    assert "3 30 264.3 1.25 0.00473 0.004 to 0.006" in page.text and "tuned 1,500 0.25" in page.text
    assert "4 more cases are in" in page.text and "question 12" in page.text  # the regression is shown first
    assert "data.dataset " + "d" * 64 + " 500" in page.text
    assert "empty_answer 30 row 7:" in page.text and "trained tokens 12,345" in page.text
    assert "too long, left out 5" in page.text and "rows for training and validation 2" in page.text
    assert "900 900 870" in page.text and "64 99.12%" in page.text
    assert "code (commit) c0ffee" in page.text
    assert "base evaluate/k-evaluate_base, tuned evaluate/k-evaluate_tuned" in page.text


def test_nothing_from_outside_is_markup(store: Store) -> None:
    record = make_run(store, "done")
    (folder := store.run_dir("done") / "compare").mkdir()
    (folder / "failure.json").write_text(json.dumps({"time": "2126-01-01T00:00:00+00:00", "message": HOSTILE}))
    for page in (read(store, record), read(store, make_run(store, "bad", state="rejected", until="compare"))):
        assert HOSTILE in "".join(page.texts)
        assert not {"script", "img", "iframe", "object", "image", "use"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on") or name in {"src", "style"}]
        links = {value for name, value in page.attributes if name in {"href", "xlink:href"}}
        assert all(re.fullmatch(r"#[a-z]+|data:,", link) for link in links)


def test_half_a_character_that_a_model_said_does_not_end_the_page(store: Store) -> None:
    text = write_page(store, make_run(store, "done")).read_text()
    assert "half a pair ?" in text and text.rstrip().endswith("</html>")


def test_why_a_stage_ran_or_did_not(store: Store) -> None:
    commit(store, "train", "older", lr=0.5)
    path = store.path("train", "older") / "manifest.json"
    before = RunFacts(store, make_run(store, "first"))  # made in this run's time, so it is no reason
    assert {stage.record.name: stage.why for stage in before.stages}["train"] == "the store had nothing like it"
    from mcore.artifacts import Manifest

    old = Manifest.read(path.parent)
    path.write_text(
        Manifest(**{name: getattr(old, name) for name in Manifest.__slots__} | {"created": "2026-01-01"}).to_json()
    )
    facts = RunFacts(store, make_run(store, "second", cached=("convert",)))
    why = {stage.record.name: stage.why for stage in facts.stages}
    assert why["train"] == "other than train/older in: train.lr: 0.5 -> 0.1"
    assert re.fullmatch(r"made 20\d\d-.* in 10.0 s from the same inputs and settings", why["convert"])


@pytest.mark.parametrize(
    ("mfu", "cached", "words"),
    [
        (None, (), "No GPU; 1.0042 process-hours on CPU in this run, 0.0000 earlier."),
        (0.4, (), "1.0000 GPU-hours in this run; 0.0042 process-hours on CPU in this run, 0.0000 earlier."),
        (0.4, ("train",), "0.0000 GPU-hours in this run, and 1.0000 earlier in what it reused; 0.0042 process-hours"),
    ],
)
def test_cost_is_processes_times_time(store: Store, mfu: float | None, cached: tuple[str, ...], words: str) -> None:
    page = read(store, make_run(store, "costly", mfu=mfu, cached=cached))
    assert words in page.text  # two processes train for half an hour; the rest takes 15 s


def test_a_gate_that_said_no_shows_its_own_report_and_nothing_of_earlier_runs(store: Store) -> None:
    make_run(store, "earlier")
    record = make_run(store, "no", state="rejected", until="verify_convert")
    folder = store.run_dir("no") / "verify_convert"
    folder.mkdir()
    (folder / "report.json").write_text(verify_report(error=float("nan"), broken=True))
    digest = {"time": ENDED, "kind": "gate", "cause": "why", "next": "look", "tail": ["last", "line"], "attempt": 2}
    (folder / "failure.json").write_text(json.dumps(digest))
    page = read(store, record)
    assert "no: rejected" in page.text and "What went wrong" in page.texts
    assert "Class: gate ; why. Attempt 2. Next: look" in page.text and "last\nline" in page.texts
    assert "1 differ 0 differ FAILED" in page.text and "nan 0.0001 FAILED" in page.text
    assert "head nan 0.0001 FAILED" in page.text and "3 of 9 values" in page.text
    assert "train not reached" in page.text
    assert "Data" in page.texts  # what was reached in front of it is told
    for part in ("Training", "Base against tuned"):
        assert part not in page.texts


def test_a_digest_that_an_earlier_attempt_left_is_not_told(store: Store) -> None:
    record = make_run(store, "no", state="failed", until="train")
    folder = store.run_dir("no") / "train"
    folder.mkdir()
    (folder / "failure.json").write_text(json.dumps({"time": "2020-01-01T00:00:00+00:00", "message": "long ago"}))
    page = read(store, record)
    assert "long ago" not in page.text and "no: <script>" in "".join(page.texts)


def test_a_store_whose_artifacts_were_deleted_still_has_a_page(store: Store) -> None:
    page = read(store, make_run(store, "empty", made=False, cached=("convert",)))
    assert "its artifact was in the store, and was deleted since" in page.text
    assert "its artifact was deleted since" in page.text and "svg" not in page.tags
