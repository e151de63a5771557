"""A verification as a page, `report.md`: verdict first, then each proof, then every part of the model."""

from __future__ import annotations

from pathlib import Path

from mcore.verify.compare import passes
from mcore.verify.peers import peer_lines
from mcore.verify.report import REPORT_JSON, NoiseResult, NumericalResult, StructuralResult, VerifyReport

REPORT_MD = "report.md"


def write_report(report: VerifyReport, folder: Path, *, against_peers: bool = False) -> None:
    """Write `report.json` and `report.md` into a folder.

    Args:
        report: What was found.
        folder: Where to write.
        against_peers: Whether the page also says what other tools' rules make of the same logits.
    """
    (folder / REPORT_JSON).write_text(report.model_dump_json(indent=2) + "\n")
    (folder / REPORT_MD).write_text(to_markdown(report, against_peers=against_peers))


def to_markdown(report: VerifyReport, *, against_peers: bool = False) -> str:
    """The page. Arguments as in `write_report`."""
    lines = [
        f"# Verification: {'passed' if report.passed else 'FAILED'}",
        "",
        f"* Hugging Face: `{report.hf}`",
        f"* megatron-core: `{report.mcore}`",
        f"* family: {report.family}",
        "* " + ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        "",
        *_structural_lines(report.structural),
        "",
    ]
    numerical = report.numerical
    if numerical is not None:
        lines += [*_numerical_lines(numerical), ""]
    if report.noise is not None:
        lines += [*_noise_lines(report.noise), ""]
    if numerical is None or report.not_compared:
        lines += ["## Logits: not compared", "", *(f"* {why}" for why in report.not_compared or (_WHY_NOT,)), ""]
    if numerical is None:
        return "\n".join(lines)
    if against_peers:
        error, gate = numerical.relative_error, numerical.max_relative_error
        lines += [*peer_lines(numerical.prompts, relative_error=error, max_relative_error=gate), ""]
    return "\n".join([*lines, *_part_lines(numerical)]) + "\n"


_WHY_NOT = "Names or shapes do not fit, so the two sides can't both be built."


def _structural_lines(result: StructuralResult) -> list[str]:
    lines = [
        f"## Bits on disk (T0): {'equal' if result.passed else 'NOT EQUAL'}",
        "",
        f"{result.num_hf_tensors} Hugging Face tensors ({result.num_bytes / 1e9:.3f} GB) against "
        f"{result.num_mcore_tensors} of the checkpoint, {result.seconds:.1f} s.",
    ]
    lines += [
        f"{cast.num_tensors} tensors are compared after a cast from {cast.mcore_dtype} to {cast.hf_dtype}."
        for cast in result.casts
    ]
    if result.dequantised:
        lines.append(
            f"{len(result.dequantised)} Hugging Face tensors are quantised: transformers' own functions dequantised "
            "them to bfloat16, and the checkpoint holds just these bits."
        )
    if result.ignored_hf:
        lines.append(f"Left out by the family's table: {', '.join(f'`{name}`' for name in result.ignored_hf)}.")
    if result.findings:
        lines += ["", "| tensor | finding | detail |", "|---|---|---|"]
        lines += [f"| `{finding.tensor}` | {finding.kind} | {finding.detail} |" for finding in result.findings]
    return lines


def _numerical_lines(result: NumericalResult) -> list[str]:
    lines = [
        f"## Logits (T1): {'equal' if result.passed else 'NOT EQUAL'}",
        "",
        f"Largest difference of fp32 logits, in their standard deviations: {result.summary}.",
        *(
            [f"megatron's weights were rounded to {result.rounded_to} first, as the export did."]
            if result.rounded_to
            else []
        ),
        f"Prompts: {result.prompt_source}, digest `{result.prompt_digest[:12]}`, on {result.device}, "
        f"{result.seconds:.1f} s.",
        "",
        "| prompt | tokens | relative error | max abs | mean abs | HF std | mean cosine | min cosine | same top-1 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {p.prompt} | {p.num_tokens} | {p.relative_error:.2e} | {p.max_abs:.2e} | {p.mean_abs:.2e} | {p.hf_std:.3f} "
        f"| {p.mean_cosine:.6f} | {p.min_cosine:.6f} | {p.top1_agreement:.1%} |"
        for p in result.prompts
    ]
    if result.unreached_lengths:
        lines += ["", f"Too long for these prompts (`max_prompt_tokens`): {', '.join(result.unreached_lengths)}."]
    return [*lines, *_expert_lines(result)]


def _expert_lines(result: NumericalResult) -> list[str]:
    if not result.num_experts:
        return []
    if not result.unreached_experts:
        return ["", f"Every one of the {result.num_experts} experts of every decoder layer got tokens."]
    return [
        "",
        "Experts that no token went to, so that only their bits are proven:",
        "",
        *(f"* layer {layer}: {', '.join(map(str, of))}" for layer, of in sorted(result.unreached_experts.items())),
    ]


def _noise_lines(result: NoiseResult) -> list[str]:
    return [
        f"## Logits in {result.dtype} (T2): {'as near' if result.passed else 'NOT AS NEAR'}",
        "",
        "Root mean square distance of a position from the fp32 logits of transformers, in their standard deviations, "
        f"lower quartile over positions: "
        f"{result.summary}, {result.seconds:.1f} s.",
    ]


def _part_lines(result: NumericalResult) -> list[str]:
    return [
        "## Parts",
        "",
        "| part | relative error |",
        "|---|--:|",
        *(
            f"| {point.point} | {point.relative_error:.2e}"
            f"{'' if passes(point.relative_error, result.max_relative_error) else ' **off**'} |"
            for point in result.points
        ),
    ]
