"""Tokenised samples of a run, and which of them training sees when.

Which sample a step reads depends only on its number, counted from the start of training, and on `data_seed`: not on the
number of processes, nor on where a run was interrupted.

Samples lie in blocks of flat arrays. Those of a prepared folder (`mcore.data.prepare`) are parts of a file that the
system maps into memory: pages that training touches are read, and all processes of a machine share them.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from mcore.data.sampling import order
from mcore.data.template import Sample
from mcore.errors import DataError, Problem

SAMPLES_FILE = "samples.arrow"
"""Every sample once, in the order of the sources: `token_ids`, `loss_mask`, `place`."""

DATASETS_FILE = "datasets.json"
"""Order, size and fingerprint of both data sets."""

NAMES = ("train", "validation")
"""The data sets of a folder; `NAME.arrow` holds the number in `samples.arrow` of each of its samples."""


@dataclass(frozen=True, slots=True)
class OverLength:
    """What became of samples longer than `max_length`: how many were left out, and how many were cut."""

    num_deleted: int = 0
    num_cut: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Samples end to end.

    Attributes:
        starts: Where each begins, and where the last ends, `[samples + 1]`, int.
        token_ids: `[tokens]`, int32.
        loss_mask: Weight of each token in the loss, `[tokens]`, float32.
        places: Where each was in its source.
    """

    starts: np.ndarray
    token_ids: np.ndarray
    loss_mask: np.ndarray
    places: Sequence[Any]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Block:
        """Samples, copied."""
        lengths = [len(sample.token_ids) for sample in samples]
        return cls(
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            np.fromiter(chain.from_iterable(sample.token_ids for sample in samples), np.int32, sum(lengths)),
            np.fromiter(chain.from_iterable(sample.loss_mask for sample in samples), np.float32, sum(lengths)),
            [sample.place for sample in samples],
        )

    def __len__(self) -> int:
        return len(self.starts) - 1


class TokenDataset(Sequence[Sample]):
    """Samples of blocks, in an order of their own.

    Args:
        samples: At least none.
        seed: Seed of the order.
        shuffle: Whether an epoch visits its samples at random.
        over_length: What was done to longer samples.
    """

    def __init__(
        self, samples: Sequence[Sample], *, seed: int = 0, shuffle: bool = False, over_length: OverLength = OverLength()
    ) -> None:
        self._fill([Block.of(samples)], np.arange(len(samples)), seed, shuffle, over_length)

    def _fill(
        self, blocks: Sequence[Block], numbers: np.ndarray, seed: int, shuffle: bool, over_length: OverLength
    ) -> None:
        self._blocks = [block for block in blocks if len(block)]
        self._firsts = list(accumulate((len(block) for block in self._blocks), initial=0))
        self._numbers = numbers
        lengths = [np.diff(block.starts) for block in self._blocks]
        self.lengths = np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int32)[numbers]
        """Tokens of each sample, `[samples]`."""
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        self.max_tokens = int(self.lengths.max(initial=0))
        """Tokens of the longest sample."""
        self.seed = seed
        self.shuffle = shuffle
        self.over_length = over_length
        # An order takes about 0.5 s a million samples, and a step may touch the ends of two epochs.
        self._order = lru_cache(maxsize=2)(self._make_order)

    @classmethod
    def of_blocks(
        cls,
        blocks: Sequence[Block],
        numbers: np.ndarray,
        *,
        seed: int = 0,
        shuffle: bool = False,
        over_length: OverLength = OverLength(),
    ) -> TokenDataset:
        """Some samples of blocks, any of them several times.

        Args:
            blocks: The samples to choose from.
            numbers: Which of them, counted over all blocks, `[samples]`, int64.
            seed: Seed of the order.
            shuffle: Whether an epoch visits its samples at random.
            over_length: What was done to longer samples.
        """
        dataset = cls.__new__(cls)
        dataset._fill(blocks, numbers, seed, shuffle, over_length)
        return dataset

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """One sample by its place among them, or several; `token_ids` is int32, `loss_mask` float32."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number = int(self._numbers[range(len(self))[index]])
        at = bisect_right(self._firsts, number) - 1
        block, place = self._blocks[at], number - self._firsts[at]
        span = slice(block.starts[place], block.starts[place + 1])
        # Copied: what is mapped can't be written to, of which torch warns.
        ids, mask = block.token_ids[span].copy(), block.loss_mask[span].copy()
        return Sample(ids, mask, str(block.places[place]))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sample]:
        return (self[place] for place in range(len(self)))

    def _make_order(self, epoch: int) -> list[int]:
        return order(len(self), seed=self.seed, epoch=epoch, shuffle=self.shuffle)

    def order(self, epoch: int) -> list[int]:
        """Indices of all samples in the order in which an epoch visits them."""
        return list(self._order(epoch))

    def sample_index(self, global_index: int) -> int:
        """Index of the sample that training reads as its `global_index`-th, counted from 0 over all epochs.

        Epochs follow each other without a gap: no sample is dropped because a batch does not divide their number.

        Raises:
            DataError: There are no samples.
        """
        if not len(self):
            raise DataError("the data can't be used", ["there are no samples"])
        epoch, place = divmod(global_index, len(self))
        return self._order(epoch)[place]

    def batch(self, consumed_samples: int, num_samples: int) -> list[Sample]:
        """The `num_samples` samples that training reads after `consumed_samples`."""
        return [self[self.sample_index(consumed_samples + offset)] for offset in range(num_samples)]

    def iterations(self, num_epochs: float, global_batch_size: int) -> int:
        """Steps that read every sample `num_epochs` times, rounded up to whole batches."""
        # Rounded first: 0.1 epochs of 30 samples are 3 samples, not the 3.0000000000000004 that floats make of it.
        return max(1, math.ceil(round(num_epochs * len(self) / global_batch_size, 9)))

    @cached_property
    def num_trained_tokens(self) -> int:
        """Tokens with a weight in the loss."""
        return sum(int(np.count_nonzero(block.loss_mask[span])) for block, span in self._runs())

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all token ids, masks and the order: equal for two datasets that train the same. 20 hex digits."""
        ids, masks = hashlib.sha256(), hashlib.sha256()
        for block, span in self._runs():
            ids.update(np.ascontiguousarray(block.token_ids[span], np.int32).data)
            masks.update(np.ascontiguousarray(block.loss_mask[span], np.float32).data)
        digest = hashlib.sha256(json.dumps([self.seed, self.shuffle, len(self)]).encode())
        digest.update(self.lengths.data)
        digest.update(ids.digest() + masks.digest())
        return digest.hexdigest()[:20]

    def _runs(self) -> Iterator[tuple[Block, slice]]:
        """Tokens of all samples in their order; samples that follow each other in a block come as one."""
        numbers = self._numbers
        borders = np.flatnonzero(np.diff(numbers) != 1) + 1
        for first, stop in zip([0, *borders], [*borders, len(numbers)], strict=True):
            number, end = (int(numbers[first]), int(numbers[stop - 1]) + 1) if stop > first else (0, 0)
            while number < end:
                at = bisect_right(self._firsts, number) - 1
                until = min(end, self._firsts[at + 1])
                starts = self._blocks[at].starts
                yield self._blocks[at], slice(starts[number - self._firsts[at]], starts[until - self._firsts[at]])
                number = until

    def describe(self) -> str:
        """Its size in words, and what was left out or cut."""
        text = (
            f"{len(self)} samples, {self.num_tokens} tokens ({self.num_trained_tokens} of them trained), "
            f"longest {self.max_tokens}"
        )
        if self.over_length.num_deleted:
            text += f"; {self.over_length.num_deleted} longer ones left out"
        if self.over_length.num_cut:
            text += f"; {self.over_length.num_cut} longer ones cut"
        return text

    def figures(self) -> dict[str, Any]:
        """All of it that `open_datasets` need not work out again, as plain values."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "over_length": asdict(self.over_length),
            "samples": len(self),
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained_tokens,
            "fingerprint": self.fingerprint,
        }


def open_datasets(folder: Path) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation samples of a folder that `mcore.data.prepare` made; validation may be empty.

    Nothing is copied but the lengths, 4 bytes a sample.

    Raises:
        DataError: The folder is none of those, or not whole.
    """
    import pyarrow as pa

    try:
        figures = json.loads((folder / DATASETS_FILE).read_text())
        blocks = blocks_of(folder)
        datasets = []
        for name in NAMES:
            numbers = [batch.column("sample").to_numpy() for batch in _batches(folder / f"{name}.arrow")]
            of = figures[name]
            dataset = TokenDataset.of_blocks(
                blocks,
                np.concatenate([np.empty(0, np.int64), *numbers]),
                seed=of["seed"],
                shuffle=of["shuffle"],
                over_length=OverLength(**of["over_length"]),
            )
            found = {"samples": len(dataset), "tokens": dataset.num_tokens}
            if found != {key: of[key] for key in found}:
                raise ValueError(f"{name} has {found}, {DATASETS_FILE} says {of}")
            # Of the file's making, which its manifest vouches for: to work them out is to read all of it.
            vars(dataset).update(num_trained_tokens=of["trained_tokens"], fingerprint=of["fingerprint"])
            datasets.append(dataset)
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as exc:
        problem = Problem(
            str(folder), "a folder that `mcore-flows prepare` made", f"{type(exc).__name__}: {exc}", "Make it again."
        )
        raise DataError("the prepared data can't be read", [problem]) from exc
    return datasets[0], datasets[1]


def blocks_of(folder: Path) -> list[Block]:
    """All samples of a prepared folder, mapped into memory."""
    return [_block_of(batch) for batch in _batches(folder / SAMPLES_FILE)]


def _batches(path: Path) -> list[Any]:
    import pyarrow as pa

    file = pa.ipc.open_file(pa.memory_map(str(path)))
    return [file.get_batch(number) for number in range(file.num_record_batches)]


def _block_of(batch: Any) -> Block:
    ids, mask = batch.column("token_ids"), batch.column("loss_mask")
    return Block(ids.offsets.to_numpy(), ids.values.to_numpy(), mask.values.to_numpy(), batch.column("place"))
