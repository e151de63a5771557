"""The tensors of a checkpoint on their way to disk, on threads of this process.

megatron-core has processes write them that it forks off this one, which has threads and maybe a CUDA context. Such a
process outlives the kill -9 of its rank, and may then write into the folder that the next attempt makes. A thread ends
with its process, and most of the work is done without Python's lock.
"""

from __future__ import annotations

import queue
import time
from threading import Thread
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mcore.errors import Problem, SavingError


class Writing:
    """What megatron-core planned for this rank, being written from the moment on that this is made.

    Args:
        request: Result of `dist_checkpointing.save` with `async_sharded_save`.
        from_copies: Whether to write copies, made at once in the host's memory, so that weights may change meanwhile.

    Attributes:
        seconds: How long this rank wrote, once it is done.
    """

    def __init__(self, request: AsyncRequest, *, from_copies: bool) -> None:
        self.seconds = 0.0
        self._request = request
        self._thread: Thread | None = None
        if request.async_fn is not None:  # else this rank has nothing that others do not write
            _, buckets, _ = request.async_fn_args
            for _, _, (_, tensors) in buckets:
                for place, (item, tensor) in enumerate(tensors):
                    tensors[place] = (item, _on_host(tensor, copied=from_copies))
            self._thread = Thread(target=self._write, args=(buckets,), daemon=True)
            self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks, and have megatron-core write what makes it a checkpoint; all ranks call it.

        Raises:
            SavingError: A rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            for finalise in self._request.finalize_fns:
                finalise()
        except CheckpointException as exc:
            problems = [Problem(f"rank {rank}", found=repr(error)) for rank, (error, _) in exc.failures.items()]
            raise SavingError("a checkpoint could not be written", problems) from exc

    def _write(self, buckets: list[Any]) -> None:
        start_s = time.perf_counter()
        written: queue.Queue[tuple[int, Any]] = queue.Queue()
        under_way: queue.Queue[int] = queue.Queue()
        threads = [
            Thread(
                target=FileSystemWriterAsync.write_preloaded_data,
                args=(self._request.async_fn.args[0], number, bucket, written, under_way),
                kwargs={"use_fsync": True},
                daemon=True,
            )
            for number, bucket in enumerate(buckets)
        ]
        for number, thread in enumerate(threads):
            under_way.put(number)
            thread.start()
        for thread in threads:
            thread.join()
        results = dict(written.get() for _ in threads)
        failed = next((result for result in results.values() if isinstance(result, Exception)), None)
        results_of_this_rank().put(failed or results)
        for _, _, (pieces, tensors) in buckets:  # megatron-core holds on to the lists
            pieces.clear()
            tensors.clear()
        self.seconds = time.perf_counter() - start_s


def results_of_this_rank() -> queue.Queue[Any]:
    """Where megatron-core looks for what was written, in this process.

    Its own queue is that of a further process, which takes 2.5 s to start and dies of the very SIGTERM that asks a
    whole process tree to save and leave.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    results: queue.Queue[Any] = filesystem_async._results_queue
    return results


def _on_host(tensor: Tensor, *, copied: bool) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor.cpu()
    return tensor.clone() if copied else tensor
