"""What other tools' rules would have said of the same logits. They judge nothing here; they show what ours adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore.verify.compare import passes
from mcore.verify.report import PromptResult, worst

MAX_MEAN_ABS = 0.1
"""The bound that Megatron-SWIFT's `--test_convert_precision` prints as advice for the mean absolute difference."""
MIN_COSINE = 0.99
"""A bound for the cosine similarity of logits: stricter than the 0.98 at which Megatron-Bridge's comparison prints a
check mark (`examples/conversion/compare_hf_and_megatron/compare.py` at 013ed71, last position only)."""


@dataclass(frozen=True, slots=True)
class PeerVerdicts:
    """Both rules on the worst prompt."""

    mean_abs: float
    """Mean absolute difference of logits."""
    mean_cosine: float
    """Mean cosine similarity of logits over positions."""

    @property
    def passes_mean_abs(self) -> bool:
        """Whether the mean absolute difference alone would have let it pass."""
        return self.mean_abs < MAX_MEAN_ABS

    @property
    def passes_cosine(self) -> bool:
        """Whether the cosine similarity alone would have let it pass."""
        return self.mean_cosine > MIN_COSINE


def peer_verdicts(prompts: Sequence[PromptResult]) -> PeerVerdicts:
    """Judge compared prompts as other tools do. No prompts, or a NaN in one, give NaN, which no rule passes."""
    if not prompts:
        return PeerVerdicts(float("nan"), float("nan"))
    return PeerVerdicts(
        mean_abs=worst(prompt.mean_abs for prompt in prompts),
        mean_cosine=1 - worst(1 - prompt.mean_cosine for prompt in prompts),
    )


def peer_lines(prompts: Sequence[PromptResult], *, relative_error: float, max_relative_error: float) -> list[str]:
    """A table of our gate and the other rules, for the report's page."""
    peers = peer_verdicts(prompts)
    rows = (
        (
            "largest difference over the logits' standard deviation (this gate)",
            f"{relative_error:.2e}",
            f"at most {max_relative_error:g}",
            passes(relative_error, max_relative_error),
        ),
        (
            "mean absolute difference (Megatron-SWIFT)",
            f"{peers.mean_abs:.2e}",
            f"below {MAX_MEAN_ABS}",
            peers.passes_mean_abs,
        ),
        ("mean cosine (Megatron-Bridge)", f"{peers.mean_cosine:.6f}", f"above {MIN_COSINE}", peers.passes_cosine),
    )
    return [
        "## Against other tools' rules",
        "",
        "| rule | found | passes if | verdict |",
        "|---|--:|---|---|",
        *(
            f"| {rule} | {found} | {bound} | {'passes' if passed else 'stopped'} |"
            for rule, found, bound, passed in rows
        ),
    ]
