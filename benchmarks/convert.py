"""Speed and memory of the conversion, beside `cp` of the same files on the same disk in the same run.

    python -m benchmarks.convert --shape dense-15gb --folder /data/bench --workers 1 --workers 2 --card card.md

`cp` is followed by fsync of every file and folder; convert and export do the same by themselves before their folder
appears. Every command is a process of its own, so its start and its imports count. T0 reads both sides again and
compares all bits. `transformers` loads the model and saves it, which is what there is without a bridge.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.measure import Run, forget, median, run, sync
from benchmarks.synthetic import SHAPES, write_model

DISK_BLOCK_BYTES = 4 * 2**20
REST_S = 2.0
"""Seconds between two commands, so that the disk has forgotten what was removed before."""
COMPARE = """
import json, sys
from pathlib import Path
from mcore.bridge.families import dims_of, family_of_config
from mcore.verify.structural import compare_on_disk
hf, release = map(Path, sys.argv[1:])
config = json.loads((hf / "config.json").read_text())
result = compare_on_disk(hf, release, family=family_of_config(config), dims=dims_of(config))
sys.exit(0 if not result.findings else f"{result.findings[:3]}")
"""
THERE_AND_BACK = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2], max_shard_size="5GB")
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """What is measured: its name, the folder it reads, the one it makes if any, and how it is run."""

    name: str
    reads: Path
    makes: Path | None
    command: Sequence[object]
    sync_after: bool = False


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things are: the model, its checkpoint, and what contenders make. No more than two are there at a time."""

    hf: Path
    mcore: Path
    made: Path


def main() -> None:
    """Make the model, measure all contenders in turn, print the card."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    folders = Folders(options.folder / "hf", options.folder / "mcore", options.folder / "made")
    config = dict(SHAPES[options.shape])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    try:
        num_bytes = write_model(folders.hf, config)
        runs = _measure(options, folders, num_bytes)
    finally:
        for folder in (folders.hf, folders.mcore, folders.made):
            _remove(folder)
    card = _card(options, num_bytes, config, runs)
    sys.stdout.write(card)
    if options.card:
        options.card.write_text(card)
    if options.json:
        table = {name: [replace(run, stdout="") for run in of_name] for name, of_name in runs.items()}
        options.json.write_text(json.dumps({name: [asdict(run) for run in all_] for name, all_ in table.items()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "deepseek-v3"], default="dense-1gb")
    parser.add_argument("--layers", type=int, help="layers, if not as many as the shape has")
    parser.add_argument("--folder", type=Path, required=True, help="where to work: room for twice the model")
    parser.add_argument("--workers", type=int, action="append", help="workers of convert and export; may be repeated")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, in alternating order")
    parser.add_argument("--warm", action="store_true", help="leave what is read in the page cache")
    parser.add_argument("--without", action="append", default=[], help="contender to leave out; may be repeated")
    parser.add_argument("--card", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args()
    options.workers = options.workers or [1, 2]
    return options


def _measure(options: argparse.Namespace, folders: Folders, num_bytes: int) -> dict[str, list[Run]]:
    """All contenders' runs by name, those that read the model first."""
    hf, mcore, made = folders.hf, folders.mcore, folders.made
    bridge = [sys.executable, "-m", "mcore.bridge"]
    from_hf = [Contender("cp", hf, made, ["cp", "-r", hf, made], sync_after=True)]
    from_mcore = [Contender("cp of the checkpoint", mcore, made, ["cp", "-r", mcore, made], sync_after=True)]
    for workers in options.workers:
        words = ["convert", "--hf", hf, "--output", made, "--workers", workers]
        from_hf.append(Contender(f"convert, {_workers(workers)}", hf, made, [*bridge, *words]))
        words = ["export", "--checkpoint", mcore, "--output", made, "--workers", workers]
        from_mcore.append(Contender(f"export, {_workers(workers)}", mcore, made, [*bridge, *words]))
    if 1.3 * num_bytes + 2e9 < psutil.virtual_memory().available:
        words = [sys.executable, "-c", THERE_AND_BACK, hf, made]
        from_hf.append(Contender("transformers", hf, made, words, sync_after=True))
    raw = options.folder / "raw"
    runs = {"the disk alone, reading and writing": [_disk_alone(hf, raw) for _ in range(options.runs)]}
    runs |= _take_turns(from_hf, options)
    run([*bridge, "convert", "--hf", hf, "--output", mcore])
    runs |= _take_turns([Contender("T0", hf, None, [sys.executable, "-c", COMPARE, hf, mcore / "release"])], options)
    _remove(hf)
    return runs | _take_turns(from_mcore, options)


def _take_turns(contenders: Sequence[Contender], options: argparse.Namespace) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for number in range(options.runs):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            if contender.name not in options.without:
                runs[contender.name].append(_run(contender, cold=not options.warm))
                _say(f"{contender.name}: {runs[contender.name][-1].seconds:.2f} s")
    return {name: of_name for name, of_name in runs.items() if of_name}


def _run(contender: Contender, *, cold: bool) -> Run:
    _remove(contender.makes)
    if cold:
        forget(contender.reads)
    time.sleep(REST_S)
    try:
        return run(contender.command, contender.makes if contender.sync_after else None)
    finally:
        _remove(contender.makes)


def _remove(path: Path | None) -> None:
    if path is not None and path.exists():
        shutil.rmtree(path)
        sync(path.parent)


def _disk_alone(hf: Path, path: Path) -> Run:
    """The disk's own speed: the model is read and as much is written around the page cache, with no copying.

    Who reads and writes at once may be a little faster, where the disk can do both at once.
    """
    block = mmap.mmap(-1, DISK_BLOCK_BYTES)
    forget(hf)
    start, num_bytes = time.monotonic(), 0
    for source in hf.glob("*.safetensors"):
        file = os.open(source, os.O_RDONLY | os.O_DIRECT)
        while count := os.readv(file, [block]):
            num_bytes += count
        os.close(file)
    block[:] = os.urandom(DISK_BLOCK_BYTES)
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    for _ in range(num_bytes // DISK_BLOCK_BYTES):
        os.write(file, block)
    os.fsync(file)
    os.close(file)
    seconds = time.monotonic() - start
    path.unlink()
    return Run(seconds, 0.0, 0, 0, "")


def _card(options: argparse.Namespace, num_bytes: int, config: dict[str, object], runs: dict[str, list[Run]]) -> str:
    medians = {name: median(of_name) for name, of_name in runs.items()}
    lines = [
        f"### {options.shape}, {num_bytes / 1e9:.1f} GB",
        "",
        f"{config['architectures'][0]}, {config['num_hidden_layers']} layers, hidden {config['hidden_size']}; "  # type: ignore[index]
        f"{'median' if options.runs > 1 else 'one'} of {options.runs} in alternating order; "
        f"what is read is {'in' if options.warm else 'dropped from'} the page cache before.",
        "",
        "| | seconds | GB/s | speed to `cp` | CPU s | peak memory, GiB | without files' pages |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, of_name in medians.items():
        copy = medians["cp of the checkpoint" if name.startswith("export") else "cp"]
        lines.append(
            f"| {name} | {of_name.seconds:.1f} | {num_bytes / 1e9 / of_name.seconds:.2f} "
            f"| {copy.seconds / of_name.seconds:.2f} | {of_name.cpu_s:.1f} "
            f"| {of_name.peak_bytes / 2**30:.2f} | {of_name.peak_own_bytes / 2**30:.2f} |"
        )
    packages = ("megatron-core", "torch", "transformers", "safetensors")
    lines += [
        "",
        f"`python -m benchmarks.convert {' '.join(sys.argv[1:])}`, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages)
        + f"; Linux {platform.release()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB.",
        "",
    ]
    return "\n".join(lines)


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
