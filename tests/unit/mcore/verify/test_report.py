import json
import math

import pytest
from pydantic import ValidationError

from mcore.errors import ConfigError, PrecisionError
from mcore.verify.page import write_report
from mcore.verify.report import (
    NumericalResult,
    PointResult,
    PromptResult,
    StructuralResult,
    TensorFinding,
    VerifyReport,
    read_report,
    worst,
)


def prompt(error: float = 3e-6) -> PromptResult:
    return PromptResult(
        prompt="seeded_0",
        num_tokens=96,
        relative_error=error,
        max_abs=2 * error,
        mean_abs=error / 10,
        hf_std=2.0,
        mean_cosine=1.0,
        min_cosine=1.0,
        top1_agreement=1.0,
        worst_position=7,
    )


def numerical(*errors: float, points: dict[str, float] | None = None, **fields) -> NumericalResult:
    return NumericalResult(
        max_relative_error=1e-4,
        prompt_source="seeded ids only",
        prompt_digest="0" * 64,
        device="cpu",
        rounded_to=None,
        prompts=tuple(prompt(error) for error in errors),
        points=tuple(
            PointResult(point=point, relative_error=error) for point, error in (points or {"head": 3e-6}).items()
        ),
        seconds=0.5,
        **fields,
    )


def structural(num_findings: int = 0, kind: str = "differs", **fields) -> StructuralResult:
    findings = tuple(TensorFinding(tensor=f"t{i}", kind=kind, detail="1 of 9 values") for i in range(num_findings))
    known = {
        "num_hf_tensors": 25,
        "num_mcore_tensors": 19,
        "num_bytes": 1000,
        "casts": (),
        "cast_to": None,
        "ignored_hf": (),
    }
    return StructuralResult(**(known | {"findings": findings, "seconds": 0.25} | fields))


def report(structure: StructuralResult, logits: NumericalResult | None, *not_compared: str) -> VerifyReport:
    return VerifyReport(
        hf="model",
        mcore="checkpoint/release",
        family="llama",
        versions={"torch": "2.13"},
        structural=structure,
        numerical=logits,
        not_compared=not_compared,
        passed=structure.passed and logits is not None and logits.passed and not not_compared,
    )


def test_a_proven_conversion_raises_nothing():
    proven = report(structural(), numerical(3e-6, 4e-6))
    assert proven.passed
    proven.raise_if_failed()
    assert proven.metrics() == {
        "passed": True,
        "num_tensors": 25,
        "bytes": 1000,
        "num_differing_tensors": 0,
        "seconds": 0.75,
        "relative_error": 4e-6,
        "max_relative_error": 1e-4,
        "top1_agreement": 1.0,
    }


@pytest.mark.parametrize("errors", [(math.nan,), (3e-6, math.nan), (math.nan, 3e-6), (math.inf,), (1.1e-4,), ()])
def test_logits_pass_only_if_every_prompt_is_a_small_number(errors):
    assert not numerical(*errors).passed


def test_the_gate_itself_still_passes():
    assert numerical(1e-4).passed


def test_the_worst_error_keeps_nan():
    assert math.isnan(worst(iter([1.0, math.nan, 2.0])))
    assert worst(iter([1.0, 3.0, 2.0])) == 3.0


def test_the_first_part_that_differs_is_named_in_order_of_computation():
    points = {"embedding": 0.0, "layers.0.attention": 1e-7, "layers.0.mlp": math.nan, "layers.1.attention": 2.0}
    failed = report(structural(), numerical(0.5, points=points))
    with pytest.raises(PrecisionError, match=r"error 5.000e-01 \(gate 1.0e-04\).*differs is layers.0.mlp") as caught:
        failed.raise_if_failed()
    assert caught.value.exit_status == 3


def test_the_message_names_twenty_tensors_and_the_report_all(tmp_path):
    failed = report(structural(31), numerical(3e-6))
    with pytest.raises(PrecisionError) as caught:
        failed.raise_if_failed()
    assert [problem.subject for problem in caught.value.problems][:20] == [f"t{i} (differs)" for i in range(20)]
    assert "and 11 more" in caught.value.problems[20].subject
    write_report(failed, tmp_path)
    assert (tmp_path / "report.md").read_text().count("| differs |") == 31
    assert len(read_report(tmp_path).structural.findings) == 31


def test_nothing_compared_is_no_proof():
    assert not report(structural(num_hf_tensors=0), numerical(3e-6)).passed
    with pytest.raises(PrecisionError, match="tensors to compare"):
        report(structural(num_hf_tensors=0), numerical(3e-6)).raise_if_failed()


def test_names_that_do_not_fit_leave_no_logits_to_compare(tmp_path):
    failed = report(structural(1, "missing"), None)
    assert not failed.structural.is_loadable
    with pytest.raises(PrecisionError, match="logits were not compared"):
        failed.raise_if_failed()
    write_report(failed, tmp_path)
    assert "## Logits: not compared" in (tmp_path / "report.md").read_text()


def test_a_proof_that_could_not_be_made_is_wrong_input_if_nothing_differs(tmp_path):
    for logits in (None, numerical(3e-6)):  # of fp32, or of the dtype of the weights only
        with pytest.raises(ConfigError, match="not compared: found no tokenizer") as caught:
            report(structural(), logits, "no tokenizer").raise_if_failed()
        assert len(caught.value.problems) == 1
        write_report(report(structural(), logits, "no tokenizer"), tmp_path)
        page = (tmp_path / "report.md").read_text()
        assert "## Logits: not compared\n\n* no tokenizer\n" in page and ("(T1)" in page) == (logits is not None)
        assert read_report(tmp_path).not_compared == ("no tokenizer",)
    for structure, logits in ((structural(2), None), (structural(), numerical(0.5))):
        with pytest.raises(PrecisionError, match="no tokenizer") as caught:
            report(structure, logits, "no tokenizer").raise_if_failed()
        assert len(caught.value.problems) == 1 + max(1, len(structure.findings))


def test_bits_on_disk_in_a_few_words():
    assert structural().summary == "equal"
    assert structural(num_hf_tensors=0).summary == "NOT equal: there is nothing to compare"
    assert structural(3).summary == "NOT equal: 3 findings, the first about t0 (differs)"


def test_weights_that_megatron_refuses_fail_the_gate():
    refused = report(structural(), numerical(points={}, not_loaded=("decoder.x: expected numbers, found NaN",)))
    assert not refused.passed
    assert "relative_error" not in refused.metrics()
    with pytest.raises(PrecisionError, match=r"can't load the weights: decoder.x: expected numbers, found NaN"):
        refused.raise_if_failed()


def test_numbers_that_are_not_finite_survive_the_file(tmp_path):
    written = report(structural(), numerical(math.nan, math.inf, points={"head": math.inf}))
    write_report(written, tmp_path)
    found = read_report(tmp_path)
    assert math.isnan(found.numerical.prompts[0].relative_error)
    assert found.numerical.prompts[1].relative_error == found.numerical.points[0].relative_error == math.inf
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written.metrics()["relative_error"] is None


def test_the_page_says_what_matters_first(tmp_path):
    points = {"embedding": 0.0, "layers.0.mlp": 0.25}
    write_report(report(structural(1), numerical(0.5, points=points)), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Verification: FAILED\n")
    assert "## Bits on disk (T0): NOT EQUAL" in page
    assert "| `t0` | differs | 1 of 9 values |" in page
    assert "| layers.0.mlp | 2.50e-01 **off** |" in page
    assert "| embedding | 0.00e+00 |" in page


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="typo"):
        structural(typo=1)
