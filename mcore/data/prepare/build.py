"""Rows to a prepared folder: tokenised once, in parts, and put in the order in which training counts them.

The rows that a run takes are told by number before any is read (`mcore.data.prepare.select`), so that no more than some
parts of them are in memory at a time. Of each row some 30 bytes stay until the end: a digest of its content, what
became of it, how long it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from configs.schema.data import DataConfig
from mcore.data.dataset import DATASETS_FILE, NAMES, SAMPLES_FILE, OverLength, TokenDataset, blocks_of, open_datasets
from mcore.data.prepare.digests import ASKED_FILE, firsts
from mcore.data.prepare.dropped import DroppedRows
from mcore.data.prepare.encode import Encoded, Encoder
from mcore.data.prepare.files import SAMPLES, batch_of, write_numbers, written
from mcore.data.prepare.report import REPORT_FILE, data_report
from mcore.data.prepare.select import Selection, first_of_each, select, set_aside
from mcore.data.prepare.workers import Work, encoded
from mcore.data.rows import MAX_LISTED, Method, raise_problems
from mcore.errors import Problem
from mcore.folders import fsync_folder, refuse_no_place, remove
from mcore.progress import Advance, progress

METRICS = "metrics.json"

PROGRESS_FROM_ROWS = 5000
"""Smaller data is tokenised in less time than it takes to read about it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is remembered of all rows that are taken, in the order of the sources.

    Attributes:
        usable: Whether each row made samples, `[rows]`, bool.
        counts: Samples of each row that are kept, were cut, and were left out, `[rows, 3]`, int32.
        digests: Of each row's content, `[rows, 2]`, uint64.
        asked: Digest of each user turn, `[turns, 2]`, uint64.
        asked_rows: The row of each user turn, `[turns]`, int64.
        dropped: The rows that can't be used.
    """

    usable: np.ndarray
    counts: np.ndarray
    digests: np.ndarray
    asked: np.ndarray
    asked_rows: np.ndarray
    dropped: DroppedRows

    def samples_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the samples of some rows, of those that have one, in their order, `[samples]`, int64."""
        counts = self.counts[:, 0]
        first = np.cumsum(counts, dtype=np.int64) - counts
        num = counts[rows]
        within = np.arange(num.sum()) - np.repeat(np.cumsum(num, dtype=np.int64) - num, num)
        found: np.ndarray = np.repeat(first[rows], num) + within
        return found

    def over_length(self, rows: np.ndarray) -> OverLength:
        """What became of those of some rows that are too long."""
        _, num_cut, num_deleted = self.counts[rows].sum(axis=0, dtype=np.int64).tolist()
        return OverLength(num_deleted=num_deleted, num_cut=num_cut)


def build_datasets(
    config: DataConfig, method: Method, hf_dir: Path, *, quiet: bool = False
) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation samples of a run, in a folder that is gone when they are.

    Args:
        config: The run's `data`.
        method: The run's `train.method`.
        hf_dir: Folder with `config.json`, tokenizer files and chat template of the base model.
        quiet: Show no progress.

    Raises:
        DataError: As `prepare`.
    """
    with TemporaryDirectory(prefix="mcore-flows-") as folder:
        prepare(config, method, hf_dir, Path(folder) / "data", quiet=quiet)
        return open_datasets(Path(folder) / "data")  # what is mapped stays as long as it is


def prepare(
    config: DataConfig, method: Method, hf_dir: Path, output: Path, *, quiet: bool = False, num_proc: int | None = None
) -> dict[str, Any]:
    """Make a prepared folder, and return its data report.

    Args:
        config: The run's `data`.
        method: The run's `train.method`.
        hf_dir: Folder with `config.json`, tokenizer files and chat template of the base model.
        output: The folder to make; what is there is replaced. It appears whole or not at all.
        quiet: Show no progress.
        num_proc: Processes, in place of `data.dataset_num_proc`. Nothing in the folder depends on them.

    Raises:
        ConfigError: The folder has no place.
        DataError: All that is wrong with sources, tokenizer and template; more rows can't be used than the run allows,
            or none is left.
        LaunchError: A process was killed.
    """
    refuse_no_place(output)
    selection = select(config)
    encoder = Encoder(config, method, hf_dir)
    partial = output.with_name(f"{output.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        work = Work(config, method, hf_dir, selection.sources)
        num_proc = num_proc or config.dataset_num_proc
        bar: AbstractContextManager[Advance] = nullcontext(lambda *_: None)
        if not quiet and selection.num_rows >= PROGRESS_FROM_ROWS:
            bar = progress("prepare", selection.num_rows, "rows")
        with bar as advance:
            rows = _write_samples(encoded(work, selection.parts(), encoder, num_proc), partial, config, advance)
        report = _write_datasets(config, selection, rows, partial)
        fsync_folder(partial)
        remove(output)
        partial.rename(output)
    finally:
        remove(partial)
    return report


def _write_samples(parts: Iterator[Encoded], folder: Path, config: DataConfig, advance: Advance) -> Rows:
    """Write the file of samples; what became of all rows.

    Raises:
        DataError: What no drop budget covers, and dropped rows if they are more than it allows.
    """
    arrays: list[tuple[np.ndarray, ...]] = []
    dropped = DroppedRows()
    problems: list[Problem] = []
    num_rows = num_problems = 0
    begin_s = time.monotonic()
    with written(folder / SAMPLES_FILE, SAMPLES) as writer:
        for part in parts:
            if len(part.block):
                writer.write(batch_of(part.block))
            arrays.append((part.usable, part.counts, part.digests, part.asked, part.asked_rows + num_rows))
            dropped.merge(part.dropped)
            problems += part.problems[: MAX_LISTED - len(problems)]
            num_rows += len(part.usable)
            num_problems += part.num_problems
            advance(len(part.usable), f"{num_rows / (time.monotonic() - begin_s):.0f} rows/s")
    problems += [Problem(f"and {num_problems - len(problems)} more problems")] * (num_problems > len(problems))
    problems += dropped.problems(config)
    raise_problems("the data can't be used", problems)
    usable, counts, digests, asked, asked_of = (np.concatenate(of_parts) for of_parts in zip(*arrays, strict=True))
    return Rows(usable, counts, digests, asked, asked_of, dropped)


def _write_datasets(config: DataConfig, selection: Selection, rows: Rows, folder: Path) -> dict[str, Any]:
    """Write which samples training and validation have, in what order, and the report.

    Raises:
        DataError: There are no samples for one of them.
    """
    same_as = firsts(rows.digests)
    chosen = {"train": selection.train, "validation": selection.validation}
    chosen = {name: numbers[rows.usable[numbers]] for name, numbers in chosen.items()}
    problems: list[Problem] = []
    if config.split_dataset_ratio:
        train = chosen["train"]
        aside = set_aside(
            train, same_as, config.split_dataset_ratio, seed=config.data_seed, shuffle=config.dataset_shuffle
        )
        chosen = {"train": train[~aside], "validation": first_of_each(train[aside], same_as)}
        if aside.all():
            found = f"{len(chosen['train'])} and {len(chosen['validation'])}"
            problems.append(Problem("data.split_dataset_ratio", "rows on both sides", found))
    blocks = blocks_of(folder)
    datasets = {
        name: TokenDataset.of_blocks(
            blocks,
            rows.samples_of(numbers),
            seed=config.data_seed,
            shuffle=config.dataset_shuffle and name == "train",
            over_length=rows.over_length(numbers),
        )
        for name, numbers in chosen.items()
    }
    for name, what in zip(NAMES, ("training", "validation"), strict=True):
        if len(chosen[name]) and not len(datasets[name]):
            problems.append(
                Problem(
                    f"{what} samples after truncation_strategy: {config.truncation_strategy}",
                    f"at least one with a trained token in its first {config.max_length} tokens",
                    "none",
                    "Raise data.max_length.",
                )
            )
    if not problems and not len(datasets["train"]):
        problems.append(Problem("data.dataset", "at least one training sample", "none"))
    raise_problems("the data can't be used with this model", problems)
    for name in NAMES:
        write_numbers(folder / f"{name}.arrow", rows.samples_of(chosen[name]))
    figures = {name: dataset.figures() for name, dataset in datasets.items()}
    (folder / DATASETS_FILE).write_text(json.dumps(figures, indent=2))
    asked = rows.asked[np.isin(rows.asked_rows, chosen["train"])]
    np.save(folder / ASKED_FILE, np.unique(asked, axis=0))
    report = data_report(config, selection, rows, chosen, datasets, same_as)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False))
    numbers = {name: value for name, value in report.items() if isinstance(value, int)}
    (folder / METRICS).write_text(json.dumps(numbers))
    return report
