"""Tokenised samples of a run, and which of them training sees when.

Which sample a step reads depends only on its number, counted from the start of training, and on `data_seed`: not on the
number of processes, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from configs.schema.data import DataConfig
from mcore.data.rows import Method, Row, load_rows, raise_problems
from mcore.data.sampling import order
from mcore.data.template import Sample, encode_rows, load_tokenizer
from mcore.errors import DataError, Problem
from mcore.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRESS_FROM_ROWS = 5000
"""Smaller data is tokenised in less time than it takes to read about it."""


@dataclass(frozen=True, slots=True)
class OverLength:
    """What became of samples longer than `max_length`: how many were left out, and how many were cut."""

    num_deleted: int = 0
    num_cut: int = 0


class TokenDataset(Sequence[Sample]):
    """Samples in the order of the rows, held as flat arrays (5 bytes a token).

    Args:
        samples: At least none.
        seed: Seed of the order.
        shuffle: Whether an epoch visits its samples at random.
        over_length: What was done to longer samples.
    """

    def __init__(
        self, samples: Sequence[Sample], *, seed: int = 0, shuffle: bool = False, over_length: OverLength = OverLength()
    ) -> None:
        lengths = [len(sample.token_ids) for sample in samples]
        self._fill(
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            np.concatenate([np.empty(0, np.int32), *(np.array(s.token_ids, np.int32) for s in samples)]),
            np.concatenate([np.empty(0, np.bool_), *(np.array(s.loss_mask, np.bool_) for s in samples)]),
        )
        self._places = [sample.place for sample in samples]
        self.seed = seed
        self.shuffle = shuffle
        self.over_length = over_length
        # An order takes about 0.5 s a million samples, and a step may touch the ends of two epochs.
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _fill(self, starts: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> None:
        self._starts, self._ids, self._mask = starts, ids, mask
        self.num_tokens = int(starts[-1])
        self.num_trained_tokens = int(mask.sum())
        self.max_tokens = int(np.diff(starts).max(initial=0))
        """Tokens of the longest sample."""

    def arrays(self) -> list[np.ndarray]:
        """All its numbers, as flat arrays: where samples start, token ids, masks."""
        return [self._starts, self._ids, self._mask]

    def description(self) -> dict[str, Any]:
        """All that is not in `arrays`, as plain values."""
        return {
            "places": self._places,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "over_length": self.over_length,
        }

    @classmethod
    def of_arrays(cls, description: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> TokenDataset:
        """The dataset that another process described so."""
        rest = dict(description)
        dataset = cls([], seed=rest["seed"], shuffle=rest["shuffle"], over_length=rest["over_length"])
        dataset._places = rest["places"]
        dataset._fill(*arrays)
        return dataset

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """One sample by its place in the files, or several; `token_ids` is int32, `loss_mask` bool."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        span = slice(self._starts[place], self._starts[place + 1])
        return Sample(self._ids[span], self._mask[span], self._places[place])  # type: ignore[arg-type]

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

    @property
    def fingerprint(self) -> str:
        """Digest of all token ids, masks and the order: equal for two datasets that train the same. 20 hex digits."""
        digest = hashlib.sha256(json.dumps([self.seed, self.shuffle, len(self)]).encode())
        for array in (self._starts, self._ids, self._mask):
            digest.update(array.tobytes())
        return digest.hexdigest()[:20]

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


def build_datasets(
    config: DataConfig, method: Method, hf_dir: Path, *, quiet: bool = False
) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation samples of a run; validation is empty if the run has none.

    The same on every process that calls it.

    Args:
        config: The run's `data`.
        method: The run's `train.method`.
        hf_dir: Folder with `config.json`, tokenizer files and chat template of the base model.
        quiet: Show no progress, as on all processes but the first.

    Raises:
        DataError: Everything that is wrong with files, rows, tokenizer or template, or no sample is left.
    """
    train_rows, validation_rows = load_rows(config, method)
    vocab_size, tokenizer = read_vocab_size(hf_dir), load_tokenizer(hf_dir)
    problems: list[Problem] = []
    datasets = []
    for name, rows in (("training", train_rows), ("validation", validation_rows)):
        samples, found = tokenise(rows, tokenizer, method, vocab_size=vocab_size, quiet=quiet)
        samples, over_length, too_long = fit_length(samples, config)
        found += too_long
        if rows and not samples and not found:
            found.append(
                Problem(
                    f"{name} samples after truncation_strategy: {config.truncation_strategy}",
                    f"at least one with a trained token in its first {config.max_length} tokens",
                    "none",
                    "Raise data.max_length.",
                )
            )
        problems += found
        shuffle = config.dataset_shuffle and name == "training"
        datasets.append(TokenDataset(samples, seed=config.data_seed, shuffle=shuffle, over_length=over_length))
    raise_problems("the data can't be used with this model", problems)
    return datasets[0], datasets[1]


def read_vocab_size(hf_dir: Path) -> int:
    """`vocab_size` of a Hugging Face folder's `config.json`.

    Raises:
        DataError: The file is missing or has none.
    """
    path = hf_dir / "config.json"
    try:
        vocab_size: Any = json.loads(path.read_text()).get("vocab_size")
    except (OSError, ValueError, AttributeError) as exc:
        raise DataError("the model's configuration can't be read", [Problem(str(path), found=str(exc))]) from exc
    if not isinstance(vocab_size, int):
        raise DataError(
            "the model's configuration can't be used", [Problem(f"{path}: vocab_size", "an integer", repr(vocab_size))]
        )
    return vocab_size


def tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, method: Method, *, vocab_size: int, quiet: bool = False
) -> tuple[list[Sample], list[Problem]]:
    """Samples of all rows, and all problems: of rows, of the template, and ids that the model has no embedding for."""
    if quiet or len(rows) < PROGRESS_FROM_ROWS:
        samples, problems = encode_rows(rows, tokenizer, method)
    else:
        with progress("tokenise", len(rows), "rows") as advance:
            samples, problems = encode_rows(rows, tokenizer, method, advance)
    problems += [
        Problem(f"{sample.place}: token id {max(sample.token_ids)}", f"ids below the model's vocab_size {vocab_size}")
        for sample in samples
        if max(sample.token_ids) >= vocab_size
    ]
    return samples, problems


def fit_length(samples: Sequence[Sample], config: DataConfig) -> tuple[list[Sample], OverLength, list[Problem]]:
    """Apply `truncation_strategy` to samples longer than `max_length`.

    With `right`, a sample that has no trained token left after the cut is left out and counted as such.

    Returns:
        The samples that stay, what was done, and with `raise` a problem for each longer sample.
    """
    longer = [sample for sample in samples if len(sample.token_ids) > config.max_length]
    if not longer:
        return list(samples), OverLength(), []
    if config.truncation_strategy == "raise":
        fix = "Raise data.max_length, or set data.truncation_strategy."
        expected = f"at most {config.max_length} tokens (data.max_length)"
        return [], OverLength(), [Problem(s.place, expected, str(len(s.token_ids)), fix) for s in longer]
    kept = []
    num_cut = 0
    for sample in samples:
        if len(sample.token_ids) <= config.max_length:
            kept.append(sample)
        elif config.truncation_strategy == "right" and any(sample.loss_mask[: config.max_length]):
            cut = slice(config.max_length)
            kept.append(Sample(sample.token_ids[cut], sample.loss_mask[cut], sample.place))
            num_cut += 1
    return kept, OverLength(num_deleted=len(samples) - len(kept), num_cut=num_cut), []
