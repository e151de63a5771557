"""The first answer counts, none in time means no, and a run that was killed goes on waiting."""

import time
from pathlib import Path

import pytest

from mcore.artifacts import Store
from mcore.errors import ConfigError
from mcore.registry.aliases import Registry
from mcore.registry.approval import Request, answer, ask, questions, read_request

KEY = "a" * 20


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Store(tmp_path), "small")


def asked(registry: Registry, timeout_s: float = 60.0, run: str = "night", key: str = KEY) -> Request:
    return ask(
        registry, key, run=run, alias="production", artifact="export/b", summary="better", timeout_s=timeout_s
    )  # fmt: skip


def test_the_first_answer_counts(registry: Registry) -> None:
    assert asked(registry).is_open and read_request(registry, KEY) == asked(registry)
    given = answer(registry, KEY, "rejected", reason="it is rude", by="ann")
    assert read_request(registry, KEY) == given and given.verdict == "rejected by ann: it is rude"
    with pytest.raises(ConfigError, match="rejected by ann"):
        answer(registry, KEY, "approved")
    assert not asked(registry).is_open  # asked again it is still what was said


def test_no_answer_in_time_means_no(registry: Registry) -> None:
    asked(registry, timeout_s=0.05)
    time.sleep(0.06)
    again = asked(registry, timeout_s=60.0)  # the time counts from the first asking
    assert not again.is_open and again.answer is None and "which means no" in again.verdict
    with pytest.raises(ConfigError, match="nobody answered until"):
        answer(registry, KEY, "approved")


def test_a_run_that_is_started_again_goes_on_waiting_for_the_same_answer(registry: Registry) -> None:
    first = asked(registry)
    second = asked(registry, run="again")
    assert (second.asked, second.until, second.run) == (first.asked, first.until, "again")


def test_who_was_not_asked_cannot_answer(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="nobody asks"):
        answer(registry, KEY, "approved")
    assert list(questions(registry)) == [] and read_request(registry, KEY) is None


def test_questions_are_listed_and_one_that_cannot_be_read_is_an_error(registry: Registry) -> None:
    asked(registry, key="b" * 20)
    asked(registry)
    assert [request.key for request in questions(registry)] == ["b" * 20, KEY]
    (registry.folder / "approvals" / f"{KEY}.json").write_text("{")
    with pytest.raises(ConfigError, match="Remove it"):
        read_request(registry, KEY)


@pytest.mark.parametrize("key", ["../promote", "/etc/passwd", "", ".hidden", "a/b"])
def test_no_key_leads_out_of_the_registry(registry: Registry, key: str) -> None:
    for access in (read_request, lambda where, name: answer(where, name, "approved")):
        with pytest.raises(ConfigError, match="no name of anything in a store"):
            access(registry, key)
