import json
import subprocess
import sys

import pytest

from mcore.errors import ConfigError, EvaluationGateError
from mcore.evaluate.compare import compare_folders
from mcore.evaluate.comparison import Comparison, read_comparison, shortened
from mcore.evaluate.report import write_comparison
from tests.unit.mcore.evaluate.evaluations import perplexity_set, write_evaluation

GOOD = [True] * 4


@pytest.fixture
def base(tmp_path):
    return write_evaluation(tmp_path / "base", {"identity": [False] * 4, "general": GOOD})


def test_pairs_cases_and_counts_by_group(base, tmp_path):
    tuned = write_evaluation(
        tmp_path / "tuned", {"identity": GOOD, "general": [True, True, False, True]}, perplexity=4.0
    )
    comparison = compare_folders(base, tuned)
    assert [(g.group, g.num_cases, g.base_passed, g.tuned_passed) for g in comparison.groups] == [
        ("identity", 4, 0, 4),
        ("general", 4, 4, 3),
    ]
    assert [(case.group, case.case) for case in comparison.regressions] == [("general", 3)]
    assert comparison.regressions[0].tuned_failures == ("is not 'yes'",)
    assert comparison.perplexity_ratio == 0.5
    assert (comparison.base.pass_rate, comparison.tuned.pass_rate) == (0.5, 0.875)
    assert comparison.gates == ()
    comparison.raise_failed_gates()


@pytest.mark.parametrize(
    ("tuned", "min_pass_rate", "max_regression", "failed"),
    [
        ({"identity": GOOD, "general": GOOD}, 1.0, 0.0, []),
        ({"identity": [True, True, False, False], "general": GOOD}, 0.75, 0.0, []),
        ({"identity": [True, False, False, False], "general": GOOD}, 0.75, 0.0, [("min_pass_rate", "all cases")]),
        ({"identity": GOOD, "general": [True, True, True, False]}, None, 0.25, []),
        ({"identity": GOOD, "general": [True, True, True, False]}, None, 0.24, [("max_regression", "general")]),
        (
            {"identity": [False] * 4, "general": [True, False, False, False]},
            0.9,
            0.5,
            [("min_pass_rate", "all cases"), ("max_regression", "general")],
        ),
    ],
)
def test_gates(base, tmp_path, tuned, min_pass_rate, max_regression, failed):
    folder = write_evaluation(tmp_path / "tuned", tuned)
    comparison = compare_folders(base, folder, min_pass_rate=min_pass_rate, max_regression=max_regression)
    assert [(gate.gate, gate.subject) for gate in comparison.failed_gates] == failed
    if not failed:
        comparison.raise_failed_gates()
        return
    with pytest.raises(EvaluationGateError) as caught:
        comparison.raise_failed_gates()
    assert caught.value.exit_status == 3
    for gate, subject in failed:
        assert f"{gate} of {subject}" in str(caught.value)


def test_the_error_names_the_cases_that_count_against_the_gate(base, tmp_path):
    tuned = write_evaluation(tmp_path / "tuned", {"identity": [False] * 4, "general": [True, False, True, True]})
    with pytest.raises(EvaluationGateError) as caught:
        compare_folders(base, tuned, max_regression=0.0).raise_failed_gates()
    subjects = [problem.subject for problem in caught.value.problems]
    # The identity cases fail as well, but the base fails them too: they do not count against this gate.
    assert subjects == ["max_regression of general", "general 2 'Say yes.'"]


def test_a_gate_at_exactly_its_limit_is_passed(tmp_path):
    """In floats 0.8 - 0.7 is more than 0.1: gates count in fractions."""
    assert 0.8 - 0.7 > 0.1
    base = write_evaluation(tmp_path / "base", {"all": [True] * 8 + [False] * 2})
    tuned = write_evaluation(tmp_path / "tuned", {"all": [True] * 7 + [False] * 3})
    assert not compare_folders(base, tuned, min_pass_rate=0.7, max_regression=0.1).failed_gates
    just_over = compare_folders(base, tuned, min_pass_rate=0.7001, max_regression=0.0999)
    assert len(just_over.failed_gates) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"suite": "other"}, "suite of the tuned model"),
        ({"max_tokens": 32}, "max_tokens of the tuned model"),
        ({"max_model_len": 512}, "max_model_len of the tuned model"),
        ({"system": "You are a pirate."}, "system of the tuned model"),
        ({"num_perplexity_tokens": 99}, "num_perplexity_tokens of the tuned model"),
        ({"perplexity": None}, "perplexity"),
        ({"num_passed": 3}, "answers.jsonl"),
    ],
)
def test_models_that_were_not_asked_the_same_are_not_compared(base, tmp_path, change, named):
    tuned = write_evaluation(tmp_path / "tuned", {"identity": [False] * 4, "general": GOOD}, **change)
    with pytest.raises(ConfigError) as caught:
        compare_folders(base, tuned)
    assert len(caught.value.problems) == 1
    assert named in caught.value.problems[0].subject


def test_other_cases_are_not_compared(base, tmp_path):
    tuned = write_evaluation(tmp_path / "tuned", {"identity": [False] * 4, "general": [*GOOD, True]})
    with pytest.raises(ConfigError, match="cases of the tuned model: expected 8 as of the base, found 9"):
        compare_folders(base, tuned)
    renamed = write_evaluation(tmp_path / "renamed", {"identity": [False] * 4, "knowledge": GOOD})
    with pytest.raises(ConfigError, match="case knowledge 4"):
        compare_folders(base, renamed)


def test_every_unreadable_folder_is_named(tmp_path):
    broken = write_evaluation(tmp_path / "broken", {"all": GOOD})
    (broken / "answers.jsonl").write_text('{"group": "all"}\n')
    with pytest.raises(ConfigError) as caught:
        compare_folders(tmp_path / "absent", broken)
    assert [problem.subject.rsplit("/", 2)[1:] for problem in caught.value.problems] == [
        ["absent", "summary.json"],
        ["broken", "answers.jsonl"],
    ]


def test_significance_is_asked_of_the_groups_that_must_not_be_forgotten(tmp_path):
    many = {"new": [True] * 30, "known": [True] * 30}
    base = write_evaluation(tmp_path / "base", many, ["known"])
    five_lost = [False] * 5 + [True] * 25
    for name, answers, failed in (
        ("forgot", {"new": [True] * 30, "known": five_lost}, ["known"]),
        ("changed", {"new": [False] * 30, "known": [True] * 30}, []),
        ("by chance", {"new": [True] * 30, "known": [False] * 4 + [True] * 26}, []),  # 1 in 16, and 0.95 is asked
    ):
        tuned = write_evaluation(tmp_path / name, answers, ["known"])
        comparison = compare_folders(base, tuned, worse_confidence=0.95)
        assert [(gate.gate, gate.subject) for gate in comparison.gates] == [("worse_confidence", "known")]
        assert [gate.subject for gate in comparison.failed_gates] == failed
    assert compare_folders(base, tmp_path / "forgot", worse_confidence=0.95).gates[0].found == 1 - 1 / 32


def test_without_a_marked_group_all_are_asked_and_share_the_false_alarms(tmp_path):
    base = write_evaluation(tmp_path / "base", {"a": [True] * 30, "b": [True] * 30})
    tuned = write_evaluation(tmp_path / "tuned", {"a": [False] * 5 + [True] * 25, "b": [True] * 30})
    (a, b) = compare_folders(base, tuned, worse_confidence=0.95).gates
    assert (a.found, a.passed, b.found) == (1 - 2 / 32, True, 0.0)
    with pytest.raises(EvaluationGateError, match="worse_confidence of a: expected confidence that it is worse below"):
        compare_folders(base, tuned, worse_confidence=0.9).raise_failed_gates()


def test_perplexity_of_forgetting_sets_is_gated_and_that_of_others_shown(tmp_path):
    rows = [(30.0, 10), (20.0, 10), (40.0, 20)]
    worse = [(loss + tokens * 0.5, tokens) for loss, tokens in rows]

    def evaluation(name, held_out, prose):
        sets = {"held_out": perplexity_set(held_out), "prose": perplexity_set(prose, forgetting=True)}
        return write_evaluation(tmp_path / name, {"all": [True]}, perplexity_sets=sets)

    before = evaluation("before", rows, rows)
    comparison = compare_folders(before, evaluation("fine", worse, rows), max_perplexity_ratio=1.1)
    assert [(gate.subject, gate.passed) for gate in comparison.gates] == [("prose", True)]
    assert comparison.perplexity_sets[0].ratio == pytest.approx(1.6487, abs=1e-4)
    assert comparison.perplexity_sets[0].ratio_interval == pytest.approx((1.6487, 1.6487), abs=1e-4)
    comparison = compare_folders(before, evaluation("forgot", rows, worse), max_perplexity_ratio=1.1)
    assert [gate.subject for gate in comparison.failed_gates] == ["prose"]
    cut = evaluation("cut", rows, rows[:2])
    with pytest.raises(ConfigError, match="perplexity sets and their tokens"):
        compare_folders(before, cut)


def test_a_comparison_can_be_read_again(base, tmp_path):
    tuned = write_evaluation(tmp_path / "tuned", {"identity": GOOD, "general": GOOD})
    comparison = compare_folders(base, tuned, min_pass_rate=0.5, max_regression=0.1)
    write_comparison(comparison, tmp_path / "out")
    read = read_comparison(tmp_path / "out")
    assert isinstance(read, Comparison)
    assert read == comparison
    with pytest.raises(ConfigError):
        read_comparison(tmp_path / "absent")


def test_shortened():
    assert shortened("a\n b\t c", 10) == "a b c"
    assert shortened("word word word", 10) == "word word…"
    assert len(shortened("x" * 99, 10)) == 10


def run_compare(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mcore.evaluate", "compare", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_writes_its_files_and_then_says_no(base, tmp_path):
    tuned = write_evaluation(tmp_path / "tuned", {"identity": GOOD, "general": [False] * 4}, perplexity=16.0)
    common = ("--base", base, "--tuned", tuned, "--output", tmp_path / "out")
    done = run_compare(*common, "--min-pass-rate", 0.9, "--max-regression", 0.5)
    assert done.returncode == 3, done.stderr
    assert "min_pass_rate of all cases" in done.stderr
    assert "max_regression of general" in done.stderr
    assert "│" not in done.stderr  # tables are for screens
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["passed"] is False
    assert written["regressions"] == [{"group": "general", "case": number} for number in (1, 2, 3, 4)]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == json.loads(done.stdout)
    assert metrics["perplexity_ratio"] == 2.0
    assert metrics["tuned_pass_rate_general"] == 0.0
    assert "FAILED" in (tmp_path / "out" / "comparison.md").read_text()

    assert run_compare(*common).returncode == 2  # the folder is in the way
    assert run_compare(*common, "--overwrite").returncode == 0  # and without gates nothing is refused


def test_the_command_loads_nothing_heavy():
    code = (
        "import sys, mcore.evaluate.__main__, mcore.evaluate.report\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'prefect', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
