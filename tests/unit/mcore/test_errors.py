"""The error tree: drawn as it is, and whole across a process border."""

import pickle
import re
import subprocess
import sys

import pytest

from mcore import errors
from mcore.errors import LaunchError, PipelineError, Problem, error_from_json


def subclasses(base: type[PipelineError]) -> list[type[PipelineError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in subclasses(child))]


TREE = [cls for cls in subclasses(PipelineError) if cls.__module__ == errors.__name__]
PROBLEMS = [Problem("a.b", "one", "two", "Do this."), Problem("just this"), Problem("ünïcode\n", found="'\"")]


def test_the_docstring_draws_the_tree_with_its_exit_statuses() -> None:
    drawn = []  # (class, parent, exit status), from the indentation of the drawing; a status holds for what is below
    path: list[tuple[str, int]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:[│ ]   )*(?:[├└]── )?)(\w+Error)\b(?: +exit status (\d+))?", line)
        if match:
            depth = len(match[1]) // 4
            status = int(match[3]) if match[3] else path[depth - 1][1]
            path[depth:] = [(match[2], status)]
            drawn.append((match[2], path[depth - 1][0] if depth else "Exception", status))
    real = [(cls.__name__, cls.__base__.__name__, cls.exit_status) for cls in TREE if cls.__base__]
    assert sorted(drawn) == sorted(real)
    assert {status for *_, status in drawn} == {1, 2, 3, 75}


def example(cls: type[PipelineError]) -> PipelineError:
    if issubclass(cls, LaunchError):
        return cls("it failed", PROBLEMS, returncode=-9, log_path="/tmp/log", tail="last\nlines")
    return cls("it failed", PROBLEMS)


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_class_survives_json_and_pickle(cls: type[PipelineError]) -> None:
    error = example(cls)
    for copy in (error_from_json(error.to_json()), pickle.loads(pickle.dumps(error))):
        assert type(copy) is cls
        assert (copy.summary, copy.problems, copy.details()) == (error.summary, error.problems, error.details())
        assert str(copy) == str(error)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"error": "ValueError", "summary": "", "problems": [], "details": {}}', '{"error": "Pip'],
)
def test_what_is_no_error_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an error document"):
        error_from_json(text)


def test_a_problem_reads_well() -> None:
    assert str(Problem("train.lr", "a number", "'x'", "Write 1.0e-4.")) == (
        "train.lr: expected a number, found 'x'. Write 1.0e-4."
    )
    assert str(Problem("there is nothing")) == "there is nothing"
    assert str(Problem("x", fix="Do it.")) == "x. Do it."


def test_an_error_lists_all_its_problems() -> None:
    text = str(PipelineError("two things", ["first", Problem("second", found="this")]))
    assert text == "two things\n  - first\n  - second: found this"


def test_a_launch_error_shows_log_and_last_lines() -> None:
    assert str(LaunchError("it died", returncode=1, log_path="/logs/a", tail="boom")).endswith(
        "All its output: /logs/a\nIts last lines:\nboom"
    )


def test_the_light_module_stands_alone() -> None:
    code = "import sys, mcore.errors; print([m for m in sys.modules if m.split('.')[0] in {'torch', 'pydantic'}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
