import io

from rich.console import Console

from mcore.evaluate.compare import compare_folders
from mcore.evaluate.report import markdown, side_by_side
from tests.unit.mcore.evaluate.evaluations import write_evaluation


def comparison_of(tmp_path, tuned, **gates):
    base = write_evaluation(tmp_path / "base", {"identity": [False, False], "general": [True, True, True]})
    return compare_folders(base, write_evaluation(tmp_path / "tuned", tuned, perplexity=2.0), **gates)


def as_text(renderable, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_page(tmp_path):
    page = markdown(
        comparison_of(tmp_path, {"identity": [True, True], "general": [True, True, False]}, max_regression=0.1)
    )
    assert "| identity | 2 | 0 (0 %) | 2 (100 %) | +100.0 points |" in page
    assert "| general | 3 | 3 (100 %) | 2 (67 %) | -33.3 points |" in page
    assert "| **all** | **5** | **3 (60 %)** | **4 (80 %)** | **+20.0 points** |" in page
    assert "base 8.000, tuned 2.000 (0.250 of the base's)" in page
    assert "| `max_regression` | general | 0.1 | 0.3333 | FAILED |" in page
    assert "- general 3, Say yes.: the answer is not 'yes'" in page
    assert "| Say yes. | ✗ no | ✓ yes |" in page


def test_page_without_gates_and_regressions_has_no_such_headings(tmp_path):
    page = markdown(comparison_of(tmp_path, {"identity": [True, True], "general": [True, True, True]}))
    assert "## Gates" not in page
    assert "## Regressions" not in page


def test_no_change_has_no_sign(tmp_path):
    page = markdown(comparison_of(tmp_path, {"identity": [False, False], "general": [True, True, True]}))
    assert page.count("| 0.0 points |") == 2 and "| **0.0 points** |" in page


def test_answers_cannot_break_the_page(tmp_path):
    comparison = comparison_of(tmp_path, {"identity": [True, True], "general": [True, True, True]})
    nasty = comparison.cases[0].model_copy(update={"tuned_answer": "a | b\n| c | <b>`x`</b> \\| " + "long " * 99})
    page = markdown(comparison.model_copy(update={"cases": (nasty, *comparison.cases[1:])}))
    row = next(line for line in page.splitlines() if "a \\| b" in line)
    assert row.count("|") - row.count("\\|") == 4  # still three columns
    assert "<b>" not in row
    assert row.endswith("… |")


def test_side_by_side(tmp_path):
    comparison = comparison_of(
        tmp_path, {"identity": [True, True], "general": [True, True, False]}, min_pass_rate=0.5, max_regression=0.1
    )
    text = as_text(side_by_side(comparison))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "identity 0 of 2 passed 2 of 2 passed" in lines
    assert lines.count("Say yes. ✗ no ✓ yes") == 2
    assert lines.count("Say yes. ✓ yes ✗ no") == 1
    assert "min_pass_rate of all cases: 0.8, limit 0.5, passed" in lines
    assert "max_regression of general: 0.3333, limit 0.1, FAILED" in lines
    assert any(line.startswith("Perplexity over 100 held-out tokens") for line in lines)


def test_a_short_side_by_side_shows_regressions_first(tmp_path):
    comparison = comparison_of(tmp_path, {"identity": [True, True], "general": [True, True, False]})
    lines = [
        " ".join(line.replace("│", " ").split())
        for line in as_text(side_by_side(comparison, cases_per_group=1)).splitlines()
    ]
    assert [line for line in lines if line.startswith("Say yes.")] == ["Say yes. ✗ no ✓ yes", "Say yes. ✓ yes ✗ no"]
    assert [line for line in lines if line.startswith("… and")] == ["… and 1 more", "… and 2 more"]


def test_square_brackets_in_answers_are_text_and_no_markup(tmp_path):
    comparison = comparison_of(tmp_path, {"identity": [True, True], "general": [True, True, True]})
    odd = comparison.cases[0].model_copy(update={"tuned_answer": "[bold]loud[/bold] [/nothing]"})
    text = as_text(side_by_side(comparison.model_copy(update={"cases": (odd, *comparison.cases[1:])})))
    assert "[bold]loud[/bold] [/nothing]" in text
