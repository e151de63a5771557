from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch

from mcore.bridge.workers import Meanwhile, Piece, divide, do_all
from mcore.errors import ConversionError, Problem, SourceError


def pieces(*sizes):
    return [Piece(step=None, rows=slice(0, size), num_bytes=size) for size in sizes]


def sizes(shares):
    return [[piece.num_bytes for piece in share] for share in shares]


def test_shares_are_alike_in_bytes_and_keep_the_order():
    assert sizes(divide(pieces(4, 1, 1, 2, 4, 4), 2)) == [[4, 1, 1, 2], [4, 4]]
    assert sizes(divide(pieces(*[1] * 9), 3)) == [[1, 1, 1]] * 3
    assert sizes(divide(pieces(5, 5), 1)) == [[5, 5]]


def test_there_are_no_more_shares_than_pieces():
    assert sizes(divide(pieces(3, 3), 7)) == [[3], [3]]


def work(result, advance):
    advance(result)
    assert torch.get_num_threads() == 1
    return result, os.getpid()


def told():
    counts = []
    return counts, lambda count=1, note="": counts.append(count)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_results_come_in_order_and_progress_is_told(num_tasks):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    counts, advance = told()
    results = do_all([partial(work, number) for number in range(num_tasks)], advance)
    assert [result for result, _ in results] == list(range(num_tasks)) and sorted(counts) == list(range(num_tasks))
    processes = {pid for _, pid in results}
    assert processes == {os.getpid()} if num_tasks == 1 else len(processes - {os.getpid()}) == num_tasks
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def interrupted(result, advance):
    signal.raise_signal(signal.SIGINT)
    return result


def test_ctrl_c_is_for_the_parent_to_act_on():
    assert do_all([partial(interrupted, 1), partial(interrupted, 2)], lambda: None) == [1, 2]


def wait_for_ever(advance):
    advance(os.getpid())
    time.sleep(600)


def fail(advance, error):
    time.sleep(0.3)
    raise error


def die(advance, number=signal.SIGKILL):
    time.sleep(0.3)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("task", "expected", "message"),
    [
        (partial(fail, error=SourceError("no", [Problem("weights")])), SourceError, r"^no\n  - weights$"),
        (partial(fail, error=ValueError("odd")), ConversionError, "ValueError: odd"),
        (die, ConversionError, r"worker 1: expected its result, found SIGKILL\. If it was killed for memory"),
        (partial(die, number=signal.SIGTERM), ConversionError, r"worker 1: expected its result, found SIGTERM$"),
    ],
)
def test_when_one_fails_the_others_are_stopped(task, expected, message):
    pids, advance = told()
    start = time.monotonic()
    with pytest.raises(expected, match=message):
        do_all([wait_for_ever, task, wait_for_ever], advance)
    assert time.monotonic() - start < 60
    assert pids and not any(map(psutil.pid_exists, pids))


PARENT = """
import sys, time
from mcore.bridge.workers import do_all
def task(advance):
    import os
    advance(os.getpid())
    time.sleep(600)
do_all([task, task], lambda count=1, note="": print(count, flush=True))
"""


def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def slow(value):
    time.sleep(0.5)
    if isinstance(value, Exception):
        raise value
    return value, os.getpid()


def test_something_is_done_meanwhile():
    meanwhile = Meanwhile("the other", partial(slow, "done"))
    meanwhile.look()
    value, pid = meanwhile.result()
    assert value == "done" and pid != os.getpid() and meanwhile.result() == (value, pid)
    meanwhile.look()


def test_what_fails_meanwhile_is_raised_by_a_look_when_it_is_known():
    meanwhile = Meanwhile("the other", partial(slow, SourceError("no", [Problem("x")])))
    meanwhile.look()
    with pytest.raises(SourceError, match="x"):
        while True:
            meanwhile.look()
            time.sleep(0.1)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_killed_meanwhile_is_named():
    meanwhile = Meanwhile("the other", be_killed)
    with pytest.raises(ConversionError, match=r"the other(.|\n)*SIGKILL"):
        meanwhile.result()
