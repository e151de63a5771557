"""What a comparison of two models holds, as it is written and read. Imports neither torch nor vLLM."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mcore.errors import ConfigError, EvaluationGateError, Problem

COMPARISON = "comparison.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class SetPerplexity(_Model):
    """One model's perplexity on one set."""

    perplexity: float
    """exp of the mean loss (nats) over all its tokens."""
    num_tokens: int
    """Tokens that it is over."""
    forgetting: bool = False
    """Whether the suite says that this must not get worse."""
    row_losses: tuple[float, ...]
    """For each row the sum of its negative log-probabilities (nats)."""
    row_tokens: tuple[int, ...]
    """For each row the tokens that the sum is over."""


class Side(_Model):
    """One model's figures: what the comparison reads of `summary.json`."""

    suite: str
    """Name of the suite."""
    num_cases: int
    """Cases that were asked."""
    num_passed: int
    """Cases that passed."""
    perplexity: float | None
    """Perplexity on the held-out rows, if it was measured."""
    num_perplexity_tokens: int
    """Tokens that the perplexity is over."""
    max_tokens: int
    """Tokens: the longest answer."""
    max_model_len: int
    """Tokens: the longest prompt and answer together."""
    system: str | None
    """System message where a case brought none."""
    dtype: str
    """Dtype that vLLM computed in."""
    device: str
    """Kind of device."""
    vllm_version: str
    """Version of vLLM."""
    perplexity_sets: dict[str, SetPerplexity] = {}
    """Perplexity sets by name; the held-out rows are `held_out`."""
    answer_s: float | None = None
    """Seconds that all answers took."""
    num_answer_tokens: int | None = None
    """Tokens of all answers."""
    first_token_s: float | None = None
    """Seconds from asking to the first token, the median over the questions, which are all asked at once."""

    @property
    def pass_rate(self) -> float:
        """Fraction of all cases that passed."""
        return self.num_passed / self.num_cases

    @property
    def answer_tokens_per_s(self) -> float | None:
        """Tokens of answers that the engine made in a second, all questions together."""
        if not self.answer_s or not self.num_answer_tokens:
            return None
        return self.num_answer_tokens / self.answer_s


class CaseAnswer(_Model):
    """One model's answer to one case: what the comparison reads of a line of `answers.jsonl`."""

    group: str
    """Group of the suite."""
    case: int
    """Number in the group, from 1."""
    prompt: str
    """The user's last turn."""
    messages: tuple[dict[str, str], ...]
    """The whole conversation that was asked."""
    expectation: str
    """What the answer must look like, in words."""
    answer: str
    """What the model said."""
    passed: bool
    """Whether it fits the expectation."""
    failures: tuple[str, ...]
    """What is wrong with it."""
    forgetting: bool = False
    """Whether the suite says that its group must not be forgotten."""


class CaseComparison(_Model):
    """One case, answered by both."""

    group: str
    """Group of the suite."""
    case: int
    """Number in the group, from 1."""
    prompt: str
    """The user's last turn."""
    expectation: str
    """What the answer must look like, in words."""
    base_answer: str
    """What the base model said."""
    base_passed: bool
    """Whether that passed."""
    tuned_answer: str
    """What the tuned model said."""
    tuned_passed: bool
    """Whether that passed."""
    tuned_failures: tuple[str, ...]
    """What is wrong with the tuned model's answer."""


class GroupComparison(_Model):
    """Cases of one group that each model passed."""

    group: str
    """Name of the group."""
    num_cases: int
    """Cases in it."""
    base_passed: int
    """Cases that the base model passed."""
    tuned_passed: int
    """Cases that the tuned model passed."""
    lost: int = 0
    """Cases that the base passed and the tuned model fails."""
    gained: int = 0
    """Cases that the base failed and the tuned model passes."""
    forgetting: bool = False
    """Whether the suite says that this is what the base knew and must stay."""
    change_interval: tuple[float, float] | None = None
    """95 % confidence interval of the change of the pass rate, tuned less base."""

    @property
    def regression(self) -> Fraction:
        """Pass rate that the tuned model lost; negative if it gained."""
        return Fraction(self.base_passed - self.tuned_passed, self.num_cases)


class SetComparison(_Model):
    """Both models' perplexity on one set."""

    name: str
    """Name of the set."""
    num_tokens: int
    """Tokens that it is over."""
    num_rows: int
    """Rows that they are in."""
    base: float
    """Perplexity of the base."""
    tuned: float
    """Perplexity of the tuned model."""
    ratio: float
    """Tuned divided by base."""
    ratio_interval: tuple[float, float]
    """95 % confidence interval of the ratio, from a bootstrap over the rows."""
    forgetting: bool
    """Whether the suite says that this must not get worse."""


class GateResult(_Model):
    """One gate, held against one figure."""

    gate: Literal["min_pass_rate", "max_regression", "max_perplexity_ratio", "worse_confidence"]
    """Its name."""
    subject: str
    """What it judged: `all cases`, a group, or a perplexity set."""
    limit: float
    """Where it draws the line."""
    found: float
    """The figure."""
    passed: bool
    """Whether the figure is on the right side; the limit itself is."""


class Comparison(_Model):
    """Base against tuned: what `comparison.json` holds."""

    base: Side
    """The base model's figures."""
    tuned: Side
    """The tuned model's figures."""
    groups: tuple[GroupComparison, ...]
    """Pass rates by group, in the order of the suite."""
    cases: tuple[CaseComparison, ...]
    """All cases, in the order of the suite."""
    perplexity_ratio: float | None
    """Perplexity of the tuned model divided by that of the base on the held-out rows, if both were measured."""
    perplexity_sets: tuple[SetComparison, ...] = ()
    """All perplexity sets, that of the held-out rows among them."""
    gates: tuple[GateResult, ...]
    """All gates that were asked for."""

    @property
    def regressions(self) -> tuple[CaseComparison, ...]:
        """Cases that the base model passed and the tuned model fails."""
        return tuple(case for case in self.cases if case.base_passed and not case.tuned_passed)

    @property
    def failed_gates(self) -> tuple[GateResult, ...]:
        """Gates that said no."""
        return tuple(gate for gate in self.gates if not gate.passed)

    def raise_failed_gates(self) -> None:
        """Do nothing if every gate was passed.

        Raises:
            EvaluationGateError: All gates that said no, each with the cases that count against it.
        """
        if not self.failed_gates:
            return
        problems = []
        for gate in self.failed_gates:
            bound = "at least" if gate.gate == "min_pass_rate" else "at most"
            if gate.gate == "worse_confidence":
                bound = "confidence that it is worse below"
            problems.append(Problem(f"{gate.gate} of {gate.subject}", f"{bound} {gate.limit:g}", f"{gate.found:.4g}"))
        problems += [
            Problem(
                f"{case.group} {case.case} {case.prompt!r}", case.expectation, repr(shortened(case.tuned_answer, 80))
            )
            for case in self._cases_against()
        ]
        raise EvaluationGateError("the tuned model is not good enough", problems)

    def _cases_against(self) -> list[CaseComparison]:
        failed = {gate.gate for gate in self.failed_gates}
        groups = {gate.subject for gate in self.failed_gates if gate.gate in ("max_regression", "worse_confidence")}
        return [
            case
            for case in self.cases
            if not case.tuned_passed and ("min_pass_rate" in failed or (case.group in groups and case.base_passed))
        ]


def read_comparison(folder: Path) -> Comparison:
    """The comparison that `mcore.evaluate compare` wrote into a folder.

    Raises:
        ConfigError: There is none that can be read.
    """
    path = folder / COMPARISON
    try:
        return Comparison.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as exc:
        raise ConfigError("the comparison can't be read", [Problem(str(path), found=str(exc))]) from exc


def shortened(text: str, num_characters: int) -> str:
    """The text on one line, cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= num_characters else f"{line[: num_characters - 1].rstrip()}…"
