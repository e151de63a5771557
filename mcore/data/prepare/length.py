"""What happens to a sample that is longer than `data.max_length`: `data.truncation_strategy`."""

from __future__ import annotations

from configs.schema.data import DataConfig
from mcore.data.template import Sample
from mcore.errors import Problem


def fit_length(sample: Sample, config: DataConfig) -> Sample | None:
    """What stays of a sample; None of one that is left out, as it has no trained token behind a cut."""
    excess = len(sample.token_ids) - config.max_length
    if excess <= 0:
        return sample
    if config.truncation_strategy not in ("left", "right"):
        return None
    kept = slice(config.max_length) if config.truncation_strategy == "right" else slice(excess, None)
    # Nothing stands before the first token that it could be predicted from.
    mask = [0.0, *sample.loss_mask[kept][1:]]
    return Sample(sample.token_ids[kept], mask, sample.place) if any(mask) else None


def too_long(sample: Sample, config: DataConfig) -> Problem:
    """A sample that `truncation_strategy: raise` does not let pass."""
    return Problem(
        sample.place,
        f"at most {config.max_length} tokens (data.max_length)",
        str(len(sample.token_ids)),
        "Raise data.max_length, or set data.truncation_strategy.",
    )
