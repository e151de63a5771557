"""Work that is divided over processes: the pieces of a conversion, and the processes that do them.

A process is forked when all is planned, so it starts at once and shares the plan's memory. It ends with its parent,
however that ends, and when one fails the others are stopped.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Literal, TypeVar, cast

import torch

from mcore.bridge.plan import Step
from mcore.errors import ConversionError, PipelineError, Problem
from mcore.progress import Advance

Result = TypeVar("Result")
Task = Callable[[Advance], Result]
"""Something to be done, which tells how far it has come."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a step's tensor on megatron's side, and the bytes that they take."""

    step: Step
    rows: slice
    num_bytes: int


def divide(pieces: Sequence[Piece], num_workers: int) -> list[list[Piece]]:
    """A list for each worker, with about the same bytes in each, neighbours together and in order."""
    total = sum(piece.num_bytes for piece in pieces)
    num_workers = min(num_workers, len(pieces))
    shares: list[list[Piece]] = [[] for _ in range(num_workers)]
    before = 0
    for piece in pieces:
        middle = before + piece.num_bytes / 2
        shares[min(int(middle * num_workers / total), num_workers - 1)].append(piece)
        before += piece.num_bytes
    return shares


def do_all(tasks: Sequence[Task[Result]], advance: Advance) -> list[Result]:
    """Do every task in a process of its own, or the only one in this process.

    Args:
        tasks: What is to be done. What they return and raise must be picklable.
        advance: Is told what the tasks tell.

    Returns:
        What they returned, in their order.

    Raises:
        PipelineError: What the first task to fail raised; the others were stopped.
        ConversionError: A process failed in another way, or was killed.
    """
    if len(tasks) == 1:
        with _one_thread():
            return [tasks[0](advance)]
    processes = []
    running: dict[Connection, int] = {}
    results: dict[int, Result] = {}
    try:
        for number, task in enumerate(tasks):
            process, receiver = _start(task)
            processes.append(process)
            running[receiver] = number
        while running:
            for receiver in cast(list[Connection], wait(list(running))):
                number = running[receiver]
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    raise _lost(f"worker {number}", processes[number]) from None
                if kind == "advance":
                    advance(value)
                elif kind == "error":
                    raise value
                else:
                    results[number] = value
                    del running[receiver]
    finally:
        for process in processes:
            if len(results) < len(tasks):
                process.kill()
            process.join()
    return [results[number] for number in range(len(tasks))]


class Meanwhile(Generic[Result]):
    """A process of its own that does something else while this one works.

    It is a fresh one, no fork: what it does may start process groups, which no fork of a process that had some can.

    Args:
        name: What it is called if it is lost.
        task: What it does. Task, result and errors must be picklable.
    """

    def __init__(self, name: str, task: Callable[[], Result]) -> None:
        self._name = name
        self._process, self._receiver = _start(partial(_without_progress, task), "spawn")
        self._result: list[Result] = []

    def look(self) -> None:
        """Raise what it raised, if it has by now."""
        if self._receiver.poll():
            self.result()

    def result(self) -> Result:
        """What it returned; waits for it.

        Raises:
            PipelineError: What it raised.
            ConversionError: It failed in another way, or was killed.
        """
        if not self._result:
            try:
                kind, value = self._receiver.recv()
            except EOFError:
                raise _lost(self._name, self._process) from None
            self._process.join()
            if kind == "error":
                raise value
            self._result.append(value)
        return self._result[0]


def _without_progress(task: Callable[[], Result], advance: Advance) -> Result:
    return task()


def _start(task: Task[Any], how: Literal["fork", "spawn"] = "fork") -> tuple[BaseProcess, Connection]:
    """A process that does the task, and the end of a pipe where it tells."""
    # Process groups that told megatron that it is alone may wait to be collected; a fork has lost their threads, and
    # would crash on collecting them.
    gc.collect()
    gc.freeze()
    context = multiprocessing.get_context(how)
    receiver, sender = context.Pipe(duplex=False)
    process: BaseProcess = context.Process(target=_do, args=(task, sender, os.getpid()), daemon=True)  # type: ignore[attr-defined]
    try:
        process.start()
    finally:
        gc.unfreeze()
    sender.close()  # so that the pipe ends when the process does
    return process, receiver


def _do(task: Task[Result], sender: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all of us, and the parent stops the others
    try:
        with _one_thread():
            result = task(lambda count=1, note="": sender.send(("advance", count)))
    except PipelineError as error:
        sender.send(("error", error))
    except BaseException as exc:
        traceback.print_exc()
        sender.send(("error", ConversionError(f"a worker failed: {type(exc).__name__}: {exc}")))
    else:
        sender.send(("result", result))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One core a worker. A look at a small block is over before a second thread has woken up, and a forked process
    has lost the pool's threads, for which it would wait.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lost(name: str, process: BaseProcess) -> ConversionError:
    process.join()
    exitcode = process.exitcode
    ended = f"exit status {exitcode}"
    if exitcode is not None and exitcode < 0:
        ended = signal.Signals(-exitcode).name
    fix = "If it was killed for memory, use fewer workers." if exitcode == -signal.SIGKILL else ""
    return ConversionError("a worker ended before its work was done", [Problem(name, "its result", ended, fix)])
