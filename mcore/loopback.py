"""A tiny all-reduce between processes of this machine, as training begins with one: NCCL on GPUs, gloo elsewhere.

    python -m mcore.loopback NUM_PROCESSES TIMEOUT_S

What keeps processes from finding each other (a firewall on the loopback, an interface that NCCL chose, a container
without shared memory, a GPU that does not answer) shows here within seconds, and not behind the loading of a model.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

from mcore.child import run_as_child
from mcore.errors import InfrastructureError, Problem

NUM_ELEMENTS = 1024
HOST = "127.0.0.1"


def spread(num_processes: int, timeout_s: float) -> None:
    """Start the processes, and wait until each has the sum of all.

    Raises:
        InfrastructureError: Some did not come to their end in time.
    """
    environment = {**os.environ, "MASTER_ADDR": HOST, "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mcore.loopback", "--rank", str(num_processes), str(timeout_s)]
    deadline = time.monotonic() + timeout_s
    started = [
        subprocess.Popen([*command, str(rank)], env={**environment, "RANK": str(rank)}) for rank in range(num_processes)
    ]
    problems = []
    for rank, process in enumerate(started):
        try:
            status = process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problems.append(Problem(f"process {rank}", f"the sum within {timeout_s:g} s", "no answer"))
        else:
            if status:
                problems.append(Problem(f"process {rank}", "the sum", f"exit status {status}"))
    if problems:
        raise InfrastructureError(f"{num_processes} processes of this machine can't talk to each other", problems)


def reduce(num_processes: int, timeout_s: float, rank: int) -> None:
    """One of the processes: its number, added up over all.

    Raises:
        InfrastructureError: The sum is wrong.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=num_processes, timeout=limit)
    numbers = torch.full((NUM_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    expected = num_processes * (num_processes + 1) / 2
    if not bool((numbers == expected).all()):
        raise InfrastructureError(f"process {rank} got {numbers[0].item():g} for a sum of {expected:g}")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def main(words: list[str]) -> None:
    """Carry out the command line."""
    if words[0] == "--rank":
        reduce(int(words[1]), float(words[2]), int(words[3]))
    else:
        spread(int(words[0]), float(words[1]))


if __name__ == "__main__":
    run_as_child(lambda: main(sys.argv[1:]))
