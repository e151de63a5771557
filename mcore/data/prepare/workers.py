"""Parts of sources handed to processes, and what these make of them, in the order of the parts."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from configs.schema.data import DataConfig
from mcore.data.prepare.encode import Encoded, Encoder
from mcore.data.prepare.select import Part
from mcore.data.rows import Method
from mcore.data.sources.source import Source
from mcore.errors import LaunchError
from mcore.supervise.processes import PR_SET_PDEATHSIG, prctl

AHEAD = 2
"""Parts a worker has waiting for it. With those that are waited for, this bounds the memory of all of it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What all parts have in common."""

    config: DataConfig
    method: Method
    hf_dir: Path
    sources: tuple[Source, ...]


def encoded(work: Work, parts: Iterable[Part], encoder: Encoder, num_proc: int) -> Iterator[Encoded]:
    """What becomes of each part, in their order, the same for any number of processes.

    Args:
        work: What all parts have in common.
        parts: In the order in which they are wanted.
        encoder: This process's own, which one process works with.
        num_proc: Processes; one is this process itself.

    Raises:
        DataError: A source can't be read any more.
        LaunchError: A process was killed.
    """
    if num_proc == 1:
        for part in parts:
            yield encoder.encode(part.read(work.sources, work.method))
        return
    # Not forked: threads of this process (of NCCL, of gloo, of the tokenizer) would be missing in the copy.
    context = get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, _begin, (work,)) as pool:
        waiting: deque[Future[Encoded]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(_encode, part))
                if len(waiting) >= AHEAD * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as exc:
            fix = "If memory is short, lower data.dataset_num_proc."
            raise LaunchError("a process that prepares data was killed", [fix]) from exc
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_mine: list[tuple[Work, Encoder]] = []
"""Of a worker: what it was begun with."""


def _begin(work: Work) -> None:
    # It ends with who started it, and leaves Ctrl-C to that one.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _mine.append((work, Encoder(work.config, work.method, work.hf_dir)))


def _encode(part: Part) -> Encoded:
    work, encoder = _mine[0]
    return encoder.encode(part.read(work.sources, work.method))
