import json

import pytest

from mcore.errors import PrecisionError
from mcore.evaluate.served.judge import MAX_ERROR, judge


def prompt(**fields):
    return {
        "place": "rows.jsonl:1, message 1",
        "token_ids": [1, 2, 3, 4],
        "prompt_token_ids": [1, 2],
        "exact": [-1.0, -2.0, -3.0],
        "reference": [-1.0, -2.0, -3.0],
    } | fields


def test_what_is_the_same_passes():
    report = judge([prompt(), prompt(prompt_token_ids=[])], [[1, 2], None], [[-1.0, -2.0, -3.0]] * 2, "float32")
    report.raise_if_failed()
    assert (report.rms_error, report.noise_ratio) == (0.0, None)
    assert report.metrics()["num_same_prompts"] == 2
    assert json.loads(report.to_json())["passed"] is True
    assert "2 of 2 prompts" in report.markdown()


@pytest.mark.parametrize("served", [[1, 9], [1], [1, 2, 3], []])
def test_other_prompt_tokens_fail(served):
    report = judge([prompt()], [served], [[-1.0, -2.0, -3.0]], "float32")
    assert not report.passed
    with pytest.raises(PrecisionError, match=r"prompt of rows\.jsonl:1, message 1: expected the tokens"):
        report.raise_if_failed()
    assert "instead of [1, 2]" in report.prompts[0].first_difference


def test_other_probabilities_fail_by_the_limit_of_the_dtype():
    limit = MAX_ERROR["float32"]
    assert judge([prompt()], [[1, 2]], [[-1.0 + 0.9 * limit, -2.0 - 0.9 * limit, -3.0]], "float32").passed
    report = judge([prompt()], [[1, 2]], [[-1.0 + 2 * limit, -2.0 - 2 * limit, -3.0]], "float32")
    assert not report.passed
    assert report.max_error == pytest.approx(2 * limit)


def test_in_16_bits_noise_is_held_against_that_of_transformers():
    noisy = prompt(reference=[-1.01, -1.99, -3.01])
    assert judge([noisy], [[1, 2]], [[-1.01, -2.01, -2.99]], "bfloat16").noise_ratio == pytest.approx(1.0)
    report = judge([noisy], [[1, 2]], [[-1.02, -2.02, -2.98]], "bfloat16")
    assert report.noise_ratio == pytest.approx(2.0)
    assert [problem.subject for problem in report.problems] == ["noise of the served model in bfloat16"]
