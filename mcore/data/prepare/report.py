"""The data report: what became of every row, and what training will see of them. The page of a run draws it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.schema.data import DataConfig
from mcore.data.dataset import TokenDataset
from mcore.data.prepare.select import Selection
from mcore.data.sampling import order
from mcore.train.packing import pack

if TYPE_CHECKING:
    from mcore.data.prepare.build import Rows

REPORT_FILE = "data_report.json"
EXAMPLES = 3
"""Examples of what is on two sides."""

STEPS = (16, 64, 256, 1024)
"""Samples of a step for which the fill of packed rows is told. How full they get depends on it (decision 0082), and the
prepared folder does not: a run that only changes its batch uses the same one."""
SAMPLES_PACKED = 20_000
"""Samples, at most, by which the fill for a step is told."""


def data_report(
    config: DataConfig,
    selection: Selection,
    rows: Rows,
    chosen: Mapping[str, np.ndarray],
    datasets: Mapping[str, TokenDataset],
    same_as: np.ndarray,
) -> dict[str, Any]:
    """All that is told of the data of a run.

    Args:
        config: The run's `data`.
        selection: The rows that it takes.
        rows: What became of them.
        chosen: Numbers of the rows of `train` and `validation`, those that are too long among them.
        datasets: The samples of both.
        same_as: For each row, the number of the first of the same content.
    """
    train, validation = datasets["train"], datasets["validation"]
    distinct = {name: np.unique(numbers) for name, numbers in chosen.items()}
    contents = {name: np.unique(same_as[numbers]) for name, numbers in distinct.items()}
    both = np.intersect1d(contents["train"], contents["validation"])
    return {
        "rows": selection.num_rows,
        "samples": len(train),
        "validation_samples": len(validation),
        "tokens": train.num_tokens,
        "trained_tokens": train.num_trained_tokens,
        "trained_share": round(train.num_trained_tokens / max(1, train.num_tokens), 4),
        "longest": train.max_tokens,
        "sources": _sources(selection, rows),
        "dropped": rows.dropped.as_report(),
        "over_length": {"left_out": train.over_length.num_deleted, "cut": train.over_length.num_cut},
        "lengths": histogram(train.lengths, config.max_length),
        "duplicates": len(distinct["train"]) - len(contents["train"]),
        "overlap_with_validation": len(both),
        "packed_fill": packed_fill(train, config.max_length),
    }


def _sources(selection: Selection, rows: Rows) -> list[dict[str, Any]]:
    found, begin = [], 0
    for source, taken in zip(selection.sources, selection.taken, strict=True):
        used = int((rows.counts[begin : begin + len(taken), 0] > 0).sum())
        begin += len(taken)
        found.append({"name": source.name, "rows": source.num_rows, "taken": len(taken), "used": used})
    return found


def histogram(lengths: np.ndarray, max_length: int) -> dict[str, int]:
    """Number of samples by length: `up to 64`, `65-128`, ... in doubling steps, the last one at `max_length`."""
    edges = [64]
    while edges[-1] < max_length:
        edges.append(min(2 * edges[-1], max_length))
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    names = [f"up to {edges[0]}", *(f"{low + 1}-{high}" for low, high in pairwise(edges))]
    return {name: int(count) for name, count in zip(names, counts, strict=False)}


def packed_fill(dataset: TokenDataset, capacity: int) -> dict[str, float]:
    """Share of places in packed rows that hold a token, by samples of a step, as `train.packing` packs them.

    Args:
        dataset: The training samples.
        capacity: Tokens of a row: `train.micro_batch_size` times its packing length.
    """
    if not len(dataset):
        return {}
    sizes = np.maximum(1, dataset.lengths[order(len(dataset), seed=dataset.seed, epoch=0, shuffle=dataset.shuffle)] - 1)
    fill = {}
    for step in STEPS:
        if step > len(sizes):
            break
        tokens = places = 0
        for start in range(0, min(len(sizes), max(step, SAMPLES_PACKED)) - step + 1, step):
            of_step = sizes[start : start + step].tolist()
            tokens += sum(of_step)
            places += capacity * len(pack(of_step, of_step, max(capacity, *of_step)))
        fill[str(step)] = round(tokens / places, 4)
    return fill


def in_words(report: Mapping[str, Any]) -> str:
    """The report in a line or a few."""
    text = (
        f"prepare: {report['rows']} rows, {report['samples']} training samples of {report['tokens']} tokens "
        f"({report['trained_share']:.0%} trained), longest {report['longest']}; {report['validation_samples']} for "
        "validation"
    )
    notes = [f"dropped {found['count']} for {reason}" for reason, found in report["dropped"].items()]
    notes += [f"{count} {what}" for what, count in {
        "too long, left out": report["over_length"]["left_out"],
        "too long, cut": report["over_length"]["cut"],
        "copies of others": report["duplicates"],
        "for validation that are trained, too": report["overlap_with_validation"],
    }.items() if count]  # fmt: skip
    return "\n".join([text, *(f"prepare: {note}" for note in notes)])
