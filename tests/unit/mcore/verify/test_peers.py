import math

from mcore.verify.peers import peer_lines, peer_verdicts
from mcore.verify.report import PromptResult


def prompt(*, mean_abs: float, mean_cosine: float) -> PromptResult:
    return PromptResult(
        prompt="p", num_tokens=8, relative_error=0.3, max_abs=0.9, mean_abs=mean_abs, hf_std=3.0,
        mean_cosine=mean_cosine, min_cosine=0.5, top1_agreement=0.9, worst_position=2,
    )  # fmt: skip


def test_the_worst_prompt_counts():
    good, bad = prompt(mean_abs=0.01, mean_cosine=0.9999), prompt(mean_abs=0.2, mean_cosine=0.98)
    assert peer_verdicts([good]).passes_mean_abs and peer_verdicts([good]).passes_cosine
    verdicts = peer_verdicts([good, bad])
    assert not verdicts.passes_mean_abs and not verdicts.passes_cosine


def test_nothing_and_nan_pass_no_rule():
    for prompts in ([], [prompt(mean_abs=math.nan, mean_cosine=math.nan)]):
        verdicts = peer_verdicts(prompts)
        assert not verdicts.passes_mean_abs and not verdicts.passes_cosine


def test_the_page_shows_a_model_that_only_this_gate_stops():
    lines = peer_lines([prompt(mean_abs=0.01, mean_cosine=0.9999)], relative_error=0.3, max_relative_error=1e-4)
    assert [line.rsplit("| ", 1)[1] for line in lines[4:]] == ["stopped |", "passes |", "passes |"]
