"""Rows a second of `mcore.data.prepare` against bare `datasets.map`, with the same tokenizer on the same rows.

    python -m benchmarks.prepare --hf HF_DIR --rows 1000000 --workers 2 --folder DIR

`datasets.map` renders the chat template and tokenises in batches, as its documentation shows it: no mask, no check of
a row, no report. Its rows are in Arrow before its time begins; ours are jsonl. Both write Arrow. They take turns, each
in a process of its own, whose memory is summed over it and all its children every 50 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

WORDS = sorted({word for text in (Path(random.__file__).read_text(),) for word in text.split() if word.isalpha()})
"""Those of the comments of Python's own library."""


def write_rows(path: Path, num_rows: int) -> None:
    """Short conversations, all different: a question of 5 to 25 words, an answer of 5 to 60."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            asked = " ".join(draw.choices(WORDS, k=draw.randint(5, 25)))
            answer = " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))
            turns = [{"role": "user", "content": f"{asked} {number}?"}, {"role": "assistant", "content": f"{answer}."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def with_datasets(rows: Path, hf: Path, folder: Path, workers: int) -> float:
    """Seconds of `datasets.map`."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    begin_s = time.perf_counter()
    loaded.map(encode, batched=True, num_proc=workers, remove_columns=loaded.column_names)
    return time.perf_counter() - begin_s


def with_prepare(rows: Path, hf: Path, folder: Path, workers: int) -> float:
    """Seconds of `prepare`, from the start of its workers to the folder's last byte."""
    from configs.schema.data import DataConfig
    from mcore.data.prepare.build import prepare

    config = DataConfig(dataset=(str(rows),))
    begin_s = time.perf_counter()
    prepare(config, "sft", hf, folder / "data", num_proc=workers)
    return time.perf_counter() - begin_s


def measured(side: str, rows: Path, hf: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Seconds of a side in a process of its own, and the most memory of it and its children (GiB)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [side, "--rows-file", rows, "--hf", hf, "--folder", folder, "--workers", workers]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.prepare", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} ended with {process.returncode}")
    return json.loads(told.splitlines()[-1])["seconds"], peak / 2**30


def _memory(pid: int) -> int:
    """Bytes that a process and its children have to themselves, and what they share once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        return total
    return total


def digest_of(folder: Path) -> str:
    """Digest of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def main() -> None:
    """Measure both sides in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", nargs="?", choices=["datasets", "prepare"], help="only this side, in this process")
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-file", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--other-workers", type=int, help="also with so many, for the digest")
    options = parser.parse_args()
    if options.side:
        side = with_datasets if options.side == "datasets" else with_prepare
        seconds = side(options.rows_file, options.hf, options.folder, options.workers)
        sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = options.folder / f"rows-{options.rows}.jsonl"
    if not rows.exists():
        write_rows(rows, options.rows)
    speeds: dict[str, list[float]] = {"datasets": [], "prepare": []}
    memory = dict.fromkeys(speeds, 0.0)
    for _ in range(options.repeats):
        for side, found in speeds.items():
            seconds, peak_gib = measured(side, rows, options.hf, options.folder / side, options.workers)
            found.append(options.rows / seconds)
            memory[side] = max(memory[side], peak_gib)
            sys.stdout.write(f"{side}: {seconds:.1f} s, {found[-1]:.0f} rows/s, {peak_gib:.2f} GiB\n")
            sys.stdout.flush()
    medians = {side: statistics.median(found) for side, found in speeds.items()}
    sys.stdout.write(f"prepare / datasets.map: {medians['prepare'] / medians['datasets']:.2f}\n")
    if options.other_workers:
        before = digest_of(options.folder / "prepare" / "data")
        measured("prepare", rows, options.hf, options.folder / "prepare", options.other_workers)
        after = digest_of(options.folder / "prepare" / "data")
        same = "the same" if before == after else "NOT the same"
        sys.stdout.write(f"digest {before}, {same} with {options.other_workers} workers\n")


if __name__ == "__main__":
    main()
