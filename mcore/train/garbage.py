"""Python's garbage collector beside a training loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Have the collector pass over what exists now: modules of libraries and the model, a million objects.

    A full collection else walks all of them every few steps, a tenth of a second in which nothing new is launched on
    the GPU. What the block itself makes is collected as ever.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
