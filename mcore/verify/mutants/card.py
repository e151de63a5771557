"""The results of all mutants as a page: `docs/benchmarks/mutants.md`."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from itertools import groupby

from mcore.verify.mutants.run import MAX_RELATIVE_ERROR, Verdict
from mcore.verify.peers import MAX_MEAN_ABS, MIN_COSINE
from mcore.verify.report import package_versions


def to_markdown(mutants: Sequence[Verdict], healthy: Sequence[Verdict], seconds: float) -> str:
    """The card: how it was made, what it shows, and both tables."""
    errors = [verdict.relative_error for verdict in mutants if math.isfinite(verdict.relative_error)]
    smallest = min(mutants, key=lambda verdict: verdict.relative_error if verdict.relative_error >= 0 else math.inf)
    lines = [
        "# Wrong conversions and the gates that stop them",
        "",
        "Each mutant is a tiny random model that was converted with one mistake: a wrong weight table, a misread "
        "config, or tensors altered on the way. The checkpoint is written to disk by the ordinary converter, loaded by "
        "megatron-core's own `dist_checkpointing`, and compared with transformers running the healthy model.",
        "",
        "* Command: `python -m mcore.verify.mutants --output DIR` (writes this page as `DIR/mutants.md`)",
        f"* Versions: {', '.join(f'{name} {number}' for name, number in package_versions().items())}",
        f"* Machine: {platform.machine()}, {os.cpu_count()} cores, no GPU; {seconds:.0f} s",
        f"* Gate (T1): largest difference of fp32 logits over their standard deviation, at most {MAX_RELATIVE_ERROR:g}",
        "* T0: bits on disk, as the wrong converter would check itself (with its own table, by its own reading of the "
        "config)",
        f"* Peers' rules: mean absolute difference of logits below {MAX_MEAN_ABS} (Megatron-SWIFT's advice); cosine of "
        f"logits above {MIN_COSINE} (Megatron-Bridge marks 0.98 and more as good). Means over positions, the worse of "
        "two prompts",
        "",
        "## Result",
        "",
        f"* {sum(not v.numerical_passed for v in mutants)} of {len(mutants)} mutants are stopped by T1. The smallest "
        f"error that it stopped is {min(errors):.1e} (`{smallest.name}`).",
        f"* {sum(v.structural_passed for v in mutants)} of {len(mutants)} pass T0.",
        f"* {sum(v.passes_mean_abs for v in mutants)} pass the rule of the mean absolute difference, "
        f"{sum(v.passes_cosine for v in mutants)} the rule of the cosine.",
        f"* {sum(v.numerical_passed and v.structural_passed for v in healthy)} of {len(healthy)} healthy models pass "
        f"both proofs, with errors from {min(v.relative_error for v in healthy):.1e} to "
        f"{max(v.relative_error for v in healthy):.1e}.",
        "",
        "## Mutants",
        "",
        "| mutant | family | mistake | T0 | T1 | relative error | first part named | mean abs | cosine | same top-1 |",
        "|---|---|---|---|---|--:|---|--:|--:|--:|",
        *map(_mutant_line, mutants),
        "",
        "`passes` in the columns of the peers' rules marks a wrong model that the rule would have let through.",
        "",
        "## Healthy models",
        "",
        "| family | model | seeds | pass T0 and T1 | relative errors |",
        "|---|---|--:|--:|---|",
        *map(_healthy_line, _by_kind(healthy)),
    ]
    return "\n".join(lines) + "\n"


def _mutant_line(v: Verdict) -> str:
    cells = [f"`{v.name}`", v.family, v.what, _word(v.structural_passed), _word(v.numerical_passed)]
    if v.not_loaded:
        cells += ["", "refused when loaded", "", "", ""]
    else:
        cells += [
            f"{v.relative_error:.1e}",
            str(v.first_bad_point),
            f"{v.mean_abs:.1e}{' **passes**' if v.passes_mean_abs else ''}",
            f"{v.mean_cosine:.4f}{' **passes**' if v.passes_cosine else ''}",
            f"{v.top1_agreement:.0%}",
        ]
    return f"| {' | '.join(cells)} |"


def _by_kind(healthy: Sequence[Verdict]) -> list[list[Verdict]]:
    return [list(of_kind) for _, of_kind in groupby(healthy, key=lambda v: (v.family, v.what))]


def _healthy_line(of_kind: Sequence[Verdict]) -> str:
    errors = [v.relative_error for v in of_kind]
    passed = sum(v.structural_passed and v.numerical_passed for v in of_kind)
    first = of_kind[0]
    return f"| {first.family} | {first.what} | {len(of_kind)} | {passed} | {min(errors):.1e} to {max(errors):.1e} |"


def _word(passed: bool) -> str:
    return "passes" if passed else "stopped"
