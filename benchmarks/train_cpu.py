"""Training on a CPU: a run's own trainer beside a bare transformers loop, on the same cores in the same call.

    python -m benchmarks.train_cpu configs/runs/smollm2_135m_cpu.yaml --model HF_DIR --checkpoint CONVERTED \
        --folder /data/bench --card card.md

All contenders read the same samples in the same order, a global batch a step, and train the same tokens by AdamW in
fp32. Bare transformers is taken twice: one process with all cores' threads, and as many processes as the run has, under
DistributedDataParallel, with a thread each. They take turns, round by round. A round's figure is its seconds over its
tokens behind the warm-up: tokens of samples, trained or not, without padding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

from benchmarks.train_cpu_transformers import MARK
from configs.schema.load import load_run
from mcore.metrics import FILE_NAME, read_metrics

WARMUP_STEPS = 2
OURS = "ours"


def main() -> None:
    """Let all contenders take turns, and print the table."""
    options = _options()
    options.folder.mkdir(parents=True)
    run_file = _short_run(options)
    cores = len(os.sched_getaffinity(0))
    processes = load_run(run_file).launch.nproc_per_node
    contenders = {
        OURS: (processes, max(1, cores // processes)),
        "transformers, one process": (1, cores),
        "transformers, DistributedDataParallel": (processes, max(1, cores // processes)),
    }
    seconds_per_token: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name, (nproc, threads) in contenders.items():
            output = options.folder / f"{number}_{name.replace(' ', '_').replace(',', '')}"
            if name == OURS:
                arguments = ["-m", "mcore.train", run_file, "--base", options.checkpoint, "--output", output]
                _torchrun(nproc, threads, arguments)
                steps = _steps(output)
            else:
                arguments = ["-m", "benchmarks.train_cpu_transformers", run_file, "--model", options.model]
                printed = _torchrun(nproc, threads, arguments)
                steps = json.loads(next(line for line in printed.splitlines() if MARK in line).split(MARK)[1])
            seconds_per_token[name].append(_rate(steps))
            _say(f"round {number + 1}, {name}: {1 / seconds_per_token[name][-1]:.1f} tokens/s")
    card = _card(options, contenders, seconds_per_token)
    sys.stdout.write(card)
    if options.card:
        options.card.write_text(card)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path, help="the run whose training is measured")
    parser.add_argument("--model", type=Path, required=True, help="its model, a Hugging Face folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the same, as `mcore-flows convert` makes it")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for runs and their output")
    parser.add_argument("--steps", type=int, default=10, help="of a round; the first ones are warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--card", type=Path, help="write the table as Markdown")
    return parser.parse_args()


def _short_run(options: argparse.Namespace) -> Path:
    """The run with the benchmark's number of steps, and with nothing but steps."""
    document = yaml.safe_load(options.run_file.read_text())
    document["train"] |= {"train_iters": options.steps, "save_steps": options.steps, "eval_steps": options.steps}
    document["data"].pop("val_dataset", None)
    path: Path = options.folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _torchrun(nproc: int, threads: int, arguments: Sequence[object]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def _steps(output: Path) -> list[tuple[float, float]]:
    """Seconds and tokens of each step, as the trainer recorded them."""
    records = [record for record in read_metrics(output / FILE_NAME) if "step_time_s" in record]
    return [(record["step_time_s"], record["tokens_per_s"] * record["step_time_s"]) for record in records]


def _rate(steps: Sequence[tuple[float, float]]) -> float:
    """Seconds a token."""
    counted = steps[WARMUP_STEPS:]
    return sum(seconds for seconds, _ in counted) / sum(tokens for _, tokens in counted)


def _card(
    options: argparse.Namespace,
    contenders: Mapping[str, tuple[int, int]],
    seconds_per_token: Mapping[str, Sequence[float]],
) -> str:
    ours = seconds_per_token[OURS]
    lines = ["| what | processes x threads | tokens/s | ours takes, per token |", "|---|---|--:|--:|"]
    for name, rates in seconds_per_token.items():
        ratios = [mine / other for mine, other in zip(ours, rates, strict=True)]
        speeds = sorted(1 / rate for rate in rates)
        lines.append(
            f"| {name} | {' x '.join(map(str, contenders[name]))} | {statistics.median(speeds):.0f} "
            f"({speeds[0]:.0f} to {speeds[-1]:.0f}) | {statistics.median(ratios):.2f} of its time |"
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    lines += [
        "",
        f"{options.run_file.name}, {options.steps - WARMUP_STEPS} steps behind {WARMUP_STEPS} of warm-up, median of "
        f"{options.rounds} rounds; the ratio is the median of the rounds' ratios. "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions}.",
        "",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
