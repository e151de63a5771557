"""Speed and memory of training on one GPU: ours beside transformers and TRL, each case a process of its own.

    python -m benchmarks.train --folder /data/bench --card card.md
    python -m benchmarks.train --folder /data/bench --shape 1.5b --contender ours --contender transformers

All train the same shapes (Qwen2.5's sizes, random weights made on the device) on the same random tokens, all of them
trained, all parameters, bf16, without recomputation, one micro-batch a step. Steps are timed on the clock after the
device is done; what counts is their median behind the warm-up. Ours runs the trainer itself: `build_training`, and
`Loop.step` with its batching, clipping, scheduler and record.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.train_cases import CONTENDERS, MARK, SHAPES, Case

LEAN = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bfloat16",
    "exp_avg_dtype": "bfloat16",
    "exp_avg_sq_dtype": "bfloat16",
}
"""As lean as transformers in bf16: gradients and moments in bf16. Main weights are fp32 to the bit all the same."""
REMAINDERS = {"use_precision_aware_optimizer": True}
"""Gradients and moments in fp32; of the main weights only what the bf16 weights lack."""


LORA = {"tuner_type": "lora", "lora_rank": 16, "lora_dropout": 0.0}
"""On all linear layers."""


def _fp8(recipe: str) -> dict[str, str]:
    return {"fp8_format": "hybrid", "fp8_recipe": recipe}


@dataclass(frozen=True, slots=True)
class Result:
    """What one case gave.

    Attributes:
        case: Which.
        steps_s: Seconds of each measured step.
        flops: Model FLOPs of a step.
        peak_flops: Of the device, a second; None if it is not known.
        allocated_bytes: Most that tensors held at any time of training.
        reserved_bytes: Most that torch held for them.
        loss: Of the last step.
        failure: Why there are no figures.
    """

    case: Case
    steps_s: list[float] = field(default_factory=list)
    flops: float = 0.0
    peak_flops: float | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    loss: float = float("nan")
    failure: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens a second in the median step."""
        return self.case.tokens / statistics.median(self.steps_s) if self.steps_s else float("nan")

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of the median step."""
        if not self.steps_s or self.peak_flops is None:
            return float("nan")
        return self.flops / statistics.median(self.steps_s) / self.peak_flops


def main() -> None:
    """Run all cases in turn and write the card."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    cases = [
        case
        for case in _cases()
        if case.shape in (options.shape or [shape for shape in SHAPES if shape != "tiny"])
        and (not options.contender or case.contender in options.contender)
        and (not options.only or case.kind in options.only)
        and (not options.match or any(fnmatch(case.name, pattern) for pattern in options.match))
    ]
    start_s = perf_counter()
    results = []
    for case in cases:
        if options.stop_after_s and perf_counter() - start_s + options.timeout_s > options.stop_after_s:
            results.append(Result(case, failure="not begun, as the time was up"))
        else:
            results.append(_run(case, options))
        _say(_row(results[-1], results))
        options.folder.joinpath("results.json").write_text(json.dumps([asdict(result) for result in results]))
    card = _card(results)
    sys.stdout.write(card)
    if options.card:
        options.card.write_text(card)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="gets results.json, logs and profiles")
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="shape; may be repeated")
    parser.add_argument("--contender", choices=list(CONTENDERS), action="append", help="contender; may be repeated")
    parser.add_argument("--only", nargs="+", choices=("plain", "lora", "fp8"), help="kinds of cases; all if left out")
    parser.add_argument("--match", nargs="+", help="patterns of cases' names, which those of their logs are")
    parser.add_argument("--stop-after-s", type=float, help="begin no case that might end later than this")
    parser.add_argument("--timeout-s", type=float, default=180, help="seconds that a case may take")
    parser.add_argument("--card", type=Path, help="write the table as Markdown")
    return parser.parse_args()


def _cases() -> list[Case]:
    """The sizes that fit an 80 GB device: the same micro-batch for all, and each one's best."""
    engine, torch_ = {"backend": "transformer_engine"}, {"backend": "torch"}
    return [
        Case("1.5b", "transformers", 2),
        Case("1.5b", "ours", 2, engine),
        Case("1.5b", "ours", 4, engine),
        Case("1.5b", "ours", 2, engine | LEAN, profile=True),
        Case("1.5b", "ours", 2, torch_),
        Case("3b", "transformers", 2),
        Case("3b", "ours", 2, engine | REMAINDERS),
        Case("3b", "ours", 2, engine | LEAN, profile=True),
        Case("3b", "ours", 4, engine | LEAN),
        Case("3b", "ours", 1, torch_ | LEAN),
        Case("0.5b", "transformers", 4),
        Case("0.5b", "ours", 4, engine),
        Case("0.5b", "ours", 8, engine),
        Case("0.5b", "ours", 4, torch_),
        Case("7b", "ours", 2, engine | LORA),
        Case("7b", "ours", 2, engine | LORA | _fp8("tensorwise")),
        Case("7b", "ours", 1, torch_ | LORA),
        Case("3b", "ours", 2, engine | LEAN | _fp8("delayed")),
        Case("3b", "ours", 2, engine | LEAN | _fp8("tensorwise")),
        Case("3b", "ours", 2, engine | LEAN | _fp8("blockwise")),
        Case("1.5b", "ours", 4, engine | _fp8("delayed")),
        Case("1.5b", "trl", 2),
        Case("0.5b", "trl", 4),
        Case("tiny", "transformers", 2),
        Case("tiny", "trl", 2),
        Case("tiny", "ours", 2, torch_),
        Case("tiny", "ours", 2, torch_ | LORA),
    ]


def _run(case: Case, options: argparse.Namespace) -> Result:
    log = _log(case, options)
    command = [sys.executable, "-m", "benchmarks.train_cases", json.dumps(asdict(case)), str(options.folder)]
    with log.open("w") as errors:
        try:
            process = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=options.timeout_s
            )
        except subprocess.TimeoutExpired:
            return Result(case, failure=f"not done in {options.timeout_s:.0f} s")
    lines = [line for line in process.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return Result(case, **json.loads(lines[-1].removeprefix(MARK)))
    text = log.read_text()
    if "OutOfMemoryError" in text:
        return Result(case, failure="out of memory")
    return Result(case, failure=next(iter(reversed(text.strip().splitlines())), "no output")[:120])


def _log(case: Case, options: argparse.Namespace) -> Path:
    path: Path = options.folder / f"{case.name}.log"
    return path


def _card(results: Sequence[Result]) -> str:
    lines = [
        "| shape | what | micro-batch | tokens/s | to transformers | MFU | GiB allocated | GiB reserved | loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(result, results) for result in results),
        "",
        "MFU = 6 * (parameters of the layers' matrix products * tokens + output layer * trained tokens) + "
        "6 * layers * heads * head size * tokens^2 of each sample (causal attention), over seconds * peak; "
        "peak: 989 TFLOP/s (H100 SXM, dense bf16). "
        f"Median of {max((len(result.steps_s) for result in results), default=0)} steps.",
        "",
        f"`python -m benchmarks.train {' '.join(sys.argv[1:])}`, Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {found}"
            for name in ("torch", "megatron-core", "transformer-engine", "transformers", "trl")
            if (found := _version(name))
        )
        + ".",
        "",
    ]
    return "\n".join(lines)


def _row(result: Result, results: Sequence[Result]) -> str:
    case = result.case
    head = f"| {case.shape} | {case.label} | {case.micro_batch_size} |"
    if result.failure:
        return f"{head} {result.failure} | | | | | |"
    rivals = [r for r in results if r.case.shape == case.shape and r.case.contender == "transformers" and r.steps_s]
    ratio = f"{result.tokens_per_s / max(r.tokens_per_s for r in rivals):.2f}" if rivals else ""
    return (
        f"{head} {result.tokens_per_s:,.0f} | {ratio} | {result.mfu:.1%} "
        f"| {result.allocated_bytes / 2**30:.1f} | {result.reserved_bytes / 2**30:.1f} | {result.loss:.3f} |"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _say(text: Any) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
