"""kill -9 at random moments of convert and export: nothing half-made is ever seen, and the next run finishes it."""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.synthetic import write_model
from mcore.supervise import descendants
from tests.faults import convert_server

pytestmark = pytest.mark.faults

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 12000,
}
"""200 MB in bfloat16."""
NUM_KILLS = 10
"""For each of both directions with each number of workers."""
NUM_KILLS_BEFORE = 2
"""Of these, at moments at which most likely nothing was written yet; the others while it writes and publishes."""


class Server:
    """The process that conversions are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, convert_server.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, what: str, *arguments: Path, **options: object) -> int:
        job = {"what": what, "arguments": list(map(str, arguments)), "options": options}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def status(self) -> int:
        return int(self._process.stdout.readline())

    def finish(self, *words: object, **options: object) -> float:
        start = time.monotonic()
        self.start(*words, **options)
        assert self.status() == 0
        return time.monotonic() - start

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, server) -> Path:
    """The model, and what undisturbed runs make of it."""
    folder = tmp_path_factory.mktemp("kill")
    assert 190e6 < write_model(folder / "hf", CONFIG) < 220e6
    for workers in (1, 2):
        server.finish("convert", folder / "hf", folder / f"mcore{workers}", num_workers=workers)
    server.finish("export", folder / "mcore1", folder / "back", max_shard_size_gb=0.05)
    return folder


def is_whole(output: Path, expected: Path) -> bool:
    """Whether both hold the same files with the same bytes, but for the seconds in metrics.json."""
    names = [
        sorted(path.relative_to(of) for path in of.rglob("*") if path.is_file() and path.name != "metrics.json")
        for of in (output, expected)
    ]
    return names[0] == names[1] and all(filecmp.cmp(output / name, expected / name, shallow=False) for name in names[0])


def wait_for(path: Path, pid: int) -> float:
    """The time at which a path is there, or the process that makes it is gone."""
    while not path.exists() and psutil.pid_exists(pid):
        time.sleep(0.001)
    return time.monotonic()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", ["convert", "export"])
def test_kill_9_at_any_moment(folder, server, tmp_path, what, workers):
    source = folder / ("hf" if what == "convert" else f"mcore{workers}")
    expected = folder / (f"mcore{workers}" if what == "convert" else "back")
    output = tmp_path / "output"
    options = {"num_workers": workers, "overwrite": True}
    if what == "export":
        options["max_shard_size_gb"] = 0.05
    begin = wait_for(tmp_path / ".output.partial", server.start(what, source, output, **options))
    assert server.status() == 0
    writes_s = time.monotonic() - begin
    moments = random.Random(f"{what} {workers}")
    num_kills = num_unfinished = num_workers_seen = 0
    while num_kills < NUM_KILLS:
        is_replacing = num_kills % 2 == 1  # every other time an old output is in the way
        old = expected if is_replacing else None
        if not is_replacing:
            subprocess.run(["rm", "-r", output], check=True)
        pid = server.start(what, source, output, **options)
        if num_kills >= NUM_KILLS_BEFORE:
            wait_for(tmp_path / ".output.partial", pid)
            time.sleep(writes_s * moments.random())
        else:
            time.sleep(0.2 * moments.random())
        pids = descendants(pid)
        workers_of_it = [process for process in psutil.process_iter() if process.pid in pids]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if server.status() == 0:
            assert is_whole(output, expected)
            continue  # it was done before: another moment
        num_kills += 1
        num_workers_seen += len(workers_of_it)
        _, alive = psutil.wait_procs(workers_of_it, timeout=20)
        assert not alive
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"output", ".output.partial", ".output.replaced"}
        if output.exists():  # the old one, or it was killed behind the last rename
            assert is_whole(output, expected)
        else:
            assert old is None or ".output.replaced" in left
        num_unfinished += ".output.partial" in left

        server.finish(what, source, output, **options)
        assert is_whole(output, expected)
        assert {path.name for path in tmp_path.iterdir()} == {"output"}
    assert num_unfinished >= (NUM_KILLS - NUM_KILLS_BEFORE) / 2
    assert (num_workers_seen > 0) == (workers > 1)
