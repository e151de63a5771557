"""Children end as whole trees, whatever they do, and come back as typed errors. All of it with real processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mcore import launch, supervise
from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import (
    ConfigError,
    GateError,
    InfrastructureError,
    InputError,
    LaunchError,
    PipelineError,
    PrecisionError,
    Problem,
    StoppedError,
)
from mcore.leases import held
from mcore.supervise.record import read_record

# Forks a grandchild that leaves the session, ignores SIGTERM and forks again; all three write their process ids.
STUBBORN_TREE = """
import os, signal, sys, time
def note():
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    note()
    time.sleep(600)
note()
time.sleep(600)
"""


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-S", "-c", textwrap.dedent(code), *map(str, args)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until(condition, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pids_in(path: Path, count: int) -> list[int]:
    wait_until(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(text) for text in path.read_text().split()]


@pytest.fixture
def start(tmp_path):
    def run(argv, **options):
        launch.run(argv, log_path=tmp_path / "stage.log", error_file=tmp_path / "error.json", **options)

    return run


def test_output_goes_to_the_log_and_lines_to_the_caller(start, tmp_path):
    lines = []
    start(
        python("import sys; print('out'); sys.stderr.write('err\\n'); sys.stdout.write('no end')"), on_line=lines.append
    )
    assert lines == ["out", "err", "no end"] or lines == ["err", "out", "no end"]
    log = (tmp_path / "stage.log").read_text()
    assert log.startswith("$ ") and "out\n" in log and "err\n" in log
    start(python("print('second attempt')"))
    assert "out\n" in (tmp_path / "stage.log").read_text(), "a retry must not erase what the attempt before said"


def test_child_has_no_stdin_no_pipe_and_a_quiet_environment(start, tmp_path):
    start(
        python(
            """
            import json, os, stat, sys
            kinds = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
            open(sys.argv[1], "w").write(json.dumps({"fds": kinds, "env": dict(os.environ)}))
            """,
            tmp_path / "seen.json",
        ),
        env={"EXTRA": "1"},
        cwd=tmp_path,
    )

    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["fds"] == ["/dev/null", str(tmp_path / "stage.log"), str(tmp_path / "stage.log")]
    assert seen["env"]["DO_NOT_TRACK"] == seen["env"]["VLLM_NO_USAGE_STATS"] == seen["env"]["EXTRA"] == "1"
    assert seen["env"][ERROR_FILE_VARIABLE] == str(tmp_path / "error.json")


def test_many_lines_are_sampled(start, tmp_path):
    lines = []
    start(python("for i in range(20000): print('line', i)"), on_line=lines.append)
    assert 40 <= len(lines) < 60
    assert "lines left out" in lines[-1] and str(tmp_path / "stage.log") in lines[-1]
    assert (tmp_path / "stage.log").read_text().count("\nline") == 20000


def test_python_warnings_stay_in_the_file(start, tmp_path):
    lines = []
    (tmp_path / "code.py").write_text("import warnings\nif True:\n    warnings.warn('of a library')\nprint('end')")
    start([sys.executable, tmp_path / "code.py"], on_line=lines.append)
    assert lines == ["end"]
    assert "UserWarning: of a library" in (tmp_path / "stage.log").read_text()


def test_of_a_progress_bar_the_end_is_handed_on(start):
    lines = []
    start(python("import sys; sys.stderr.write('\\r 10 %\\r 50 %\\r100 %\\n')"), on_line=lines.append)
    assert lines == ["100 %"]


def test_timeout_ends_the_whole_tree(start, tmp_path):
    pids = tmp_path / "pids"
    begin = time.monotonic()
    with pytest.raises(LaunchError, match="took longer than 1 s") as caught:
        start(python(STUBBORN_TREE, pids), timeout_s=1, grace_s=0.5)
    assert not isinstance(caught.value, InfrastructureError), "a stage that is too slow is not started again"
    assert time.monotonic() - begin < 1 + 0.5 + supervise.LEFTOVER_GRACE_S + supervise.KILL_WAIT_S
    assert not any(map(alive, pids_in(pids, 3)))


def test_what_stands_still_is_ended_with_its_stacks_written(start, tmp_path):
    """The metrics file grows, then no more: a rank hangs in a child of the command, which hides in its own session."""
    code = """
        import os, signal, sys, time
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        def hangs_for_ever():
            time.sleep(600)
        for step in range(4):
            open(sys.argv[1], "a").write("{}\\n")
            time.sleep(0.5)
        open(sys.argv[2], "a").write(f"{os.getpid()}\\n")
        hangs_for_ever()
    """
    metrics, pids = tmp_path / "metrics.jsonl", tmp_path / "pids"
    begin = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"stood still for 1\.5 s") as caught:
        start(python(code, metrics, pids), stall_timeout_s=1.5, progress=[metrics], grace_s=0.5)
    assert time.monotonic() - begin > 2 + 1.5 - 0.1, "it was ended while it still came further"
    tree = pids_in(pids, 2)
    assert not any(map(alive, tree))
    stacks = tmp_path / launch.STACKS
    assert str(stacks) in str(caught.value)
    assert {path.name for path in stacks.iterdir()} == {f"pid-{pid}.txt" for pid in tree}
    assert all("hangs_for_ever" in path.read_text() for path in stacks.iterdir())


def test_the_record_tells_what_is_going_on_and_how_it_ended(start, tmp_path):
    seen = []

    def on_tick():
        if record := read_record(tmp_path / launch.RECORD):
            seen.append(record)

    (tmp_path / "stage.log").write_text("of before\n")
    start(python("import time; print('now'); time.sleep(1)"), on_tick=on_tick)
    assert (
        seen and seen[0].status is None and seen[0].command == tuple(python("import time; print('now'); time.sleep(1)"))
    )
    ended = read_record(tmp_path / launch.RECORD)
    assert (ended.cause, ended.status, ended.is_alive()) == ("exited", 0, False)
    assert Path(ended.log).read_bytes()[ended.log_offset :] == b"now\n"
    with pytest.raises(InfrastructureError):
        start(python("import os; os.kill(os.getpid(), 9)"))
    assert read_record(tmp_path / launch.RECORD).status == 128 + signal.SIGKILL


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_whatever_is_raised_in_the_caller_ends_the_whole_tree(start, tmp_path, interruption):
    pids = tmp_path / "pids"

    def on_tick():
        if pids.exists() and len(pids.read_text().split()) == 3:
            raise interruption

    with pytest.raises(interruption):
        start(python(STUBBORN_TREE, pids), on_tick=on_tick, grace_s=0.5)
    assert not any(map(alive, pids_in(pids, 3)))


def test_a_child_that_ends_at_once_is_not_lost(start):
    for _ in range(10):
        start(["true"])


def test_a_child_that_ends_leaves_nothing_behind(start, tmp_path):
    pids = tmp_path / "pids"
    start(python(STUBBORN_TREE.replace("note()\ntime.sleep(600)\n", "time.sleep(0.3)\nnote()\n"), pids))
    assert not any(map(alive, pids_in(pids, 3)))


PARENT = """
import sys
from pathlib import Path
from mcore import launch
from mcore.leases import held
folder = Path(sys.argv[1])
with held(folder / "lease") as lease:
    launch.run(sys.argv[2:], log_path=folder / "stage.log", error_file=folder / "error.json", grace_s=0.5, lease=lease)
"""


def start_parent(tmp_path: Path) -> tuple[subprocess.Popen, list[int], int]:
    """A process that runs the stubborn tree: itself, the tree's pids, and the supervisor's."""
    pids = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), *python(STUBBORN_TREE, pids)])
    tree = pids_in(pids, 3)
    (supervisor,) = supervise.descendants(parent.pid) - supervise.descendants(
        min(supervise.descendants(parent.pid) - set(tree))
    )
    return parent, tree, supervisor


def test_kill_9_of_the_caller_leaves_no_orphan(tmp_path):
    parent, tree, supervisor = start_parent(tmp_path)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(alive, [*tree, supervisor])))


def test_kill_9_of_the_supervisor_leaves_no_orphan(tmp_path):
    parent, tree, supervisor = start_parent(tmp_path)
    os.kill(supervisor, signal.SIGKILL)
    assert parent.wait(timeout=15) == 1
    wait_until(lambda: not any(map(alive, tree)))


def test_next_launch_waits_until_the_tree_of_a_killed_caller_is_gone(start, tmp_path):
    parent, tree, _ = start_parent(tmp_path)
    parent.kill()
    parent.wait()
    assert any(map(alive, tree))
    with held(tmp_path / "lease") as lease:
        code = "import sys, os; sys.exit(any(os.path.exists(f'/proc/{pid}') for pid in sys.argv[1:]))"
        start(python(code, *tree), lease=lease)


def test_grace_lets_a_child_finish_what_it_is_doing(start, tmp_path):
    """Its own helper process must not be shot at meanwhile: a save may depend on it."""
    code = """
        import signal, subprocess, sys, time
        def save(*_):
            helper = subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(0.7)"])
            open(sys.argv[2], "w").write(str(helper.returncode))
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        open(sys.argv[1], "w").close()
        time.sleep(600)
    """
    ready, saved = tmp_path / "ready", tmp_path / "saved"

    def on_tick():
        if ready.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(python(code, ready, saved), on_tick=on_tick, grace_s=10)
    assert saved.read_text() == "0"


def test_ctrl_c_is_heard_even_where_a_library_drops_what_is_raised(start):
    came = []

    def on_tick():
        if not came:
            came.append(True)
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        start(python("import time; time.sleep(600)"), on_tick=on_tick)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_error_document_becomes_the_same_error(start):
    code = """
        from mcore.child import run_as_child
        from mcore.errors import PrecisionError, Problem
        def main():
            raise PrecisionError("logits differ", [Problem("layer 3", "below 1e-4", "2e-2", "Look at it.")])
        run_as_child(main)
    """
    with pytest.raises(PrecisionError) as caught:
        start([sys.executable, "-c", textwrap.dedent(code)])
    assert caught.value.problems == (Problem("layer 3", "below 1e-4", "2e-2", "Look at it."),)


def test_error_document_of_an_earlier_attempt_is_not_taken_for_this_one(start, tmp_path):
    (tmp_path / "error.json").write_text(ConfigError("old").to_json())
    with pytest.raises(LaunchError, match="exit status 1"):
        start(python("raise SystemExit(1)"))


@pytest.mark.parametrize(
    ("code", "error", "returncode"),
    [
        ("raise SystemExit(1)", LaunchError, 1),
        ("raise SystemExit(2)", InputError, None),
        ("raise SystemExit(3)", GateError, None),
        ("raise SystemExit(75)", StoppedError, 75),
        ("import os; os.kill(os.getpid(), 9)", InfrastructureError, -9),
        ("import os; os.kill(os.getpid(), 11)", InfrastructureError, -11),
    ],
)
def test_exit_status_without_a_document(start, code, error, returncode):
    with pytest.raises(error) as caught:
        start(python("print('last words')\n" + code))
    assert type(caught.value) is error
    assert getattr(caught.value, "returncode", None) == returncode
    assert "last words" in str(caught.value)


def test_tail_holds_the_last_hundred_lines(start):
    with pytest.raises(LaunchError) as caught:
        start(python("for i in range(1000): print('line', i)\nraise SystemExit(1)"))
    lines = caught.value.tail.splitlines()
    assert (len(lines), lines[0], lines[-1]) == (100, "line 900", "line 999")


def test_a_command_that_does_not_exist_is_named(start):
    with pytest.raises(LaunchError, match=r"exit status 127[\s\S]*no/such/python can't be started: No such file"):
        start(["no/such/python", "-c", "1"])


def test_a_lost_rank_is_infrastructure_whatever_its_peers_report(start, tmp_path):
    """A real torchrun: one rank is killed, the other reports an unexpected error because of it."""
    gone = tmp_path / "gone"
    code = f"""
        import os, pathlib, signal, time
        from mcore.child import run_as_child
        def main():
            gone = pathlib.Path({str(gone)!r})
            if os.environ["RANK"] == "1":
                gone.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while not gone.exists():
                time.sleep(0.01)
            raise RuntimeError("connection closed by peer")
        run_as_child(main)
    """
    with pytest.raises(InfrastructureError, match="lost a process") as caught:
        start([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python",
               sys.executable, "-c", textwrap.dedent(code)])  # fmt: skip
    assert caught.value.returncode == -signal.SIGKILL


def test_a_defect_in_a_rank_is_not_infrastructure(start):
    code = """
        import os, time
        from mcore.child import run_as_child
        def main():
            if os.environ["RANK"] == "0":
                raise RuntimeError("a defect")
            time.sleep(60)
        run_as_child(main)
    """
    with pytest.raises(PipelineError, match="unexpected RuntimeError: a defect") as caught:
        start([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python",
               sys.executable, "-c", textwrap.dedent(code)])  # fmt: skip
    assert not isinstance(caught.value, LaunchError)


def test_runs_in_a_thread_too(start):
    """Without the main thread: PR_SET_PDEATHSIG follows the thread, which lives as long as the child."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(start(python("pass"))))
    thread.start()
    thread.join(timeout=15)
    assert seen == [None]
