"""Child processes: started under a supervisor, watched, ended as a whole tree, and their errors typed again.

No output passes through a pipe: it goes to a log file that outlives everybody, and a sample of its lines to the
caller. See `mcore/supervise` for what keeps children from outliving the run, and from standing still.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mcore import supervise
from mcore.attach import Attached, attach, command_digest
from mcore.child import ERROR_FILE_VARIABLE, QUIET_ENVIRONMENT
from mcore.devices import Request
from mcore.errors import (
    EXIT_GATE,
    EXIT_INPUT,
    EXIT_RESUME,
    GateError,
    InfrastructureError,
    InputError,
    LaunchError,
    PipelineError,
    Problem,
    StoppedError,
    error_from_json,
)
from mcore.leases import Lease
from mcore.redact import redact_file, redacted, without_prefect_secrets
from mcore.supervise.claims import Work
from mcore.supervise.processes import all_pids, environment_of, send
from mcore.supervise.record import Record, read_record

POLL_S = 0.2
GRACE_S = 20.0
"""Seconds between SIGTERM and SIGKILL. Prefect kills a cancelled flow 30 s after it asked; this ends before."""
LEAVE_S = 25.0
"""Seconds that a cancelled caller waits for the tree to end; what takes longer the supervisor ends without it."""
RECORD = "process.json"
"""Name of the supervisor's record (`mcore/supervise/record.py`) beside the log."""
STACKS = "stacks"
"""Name of the folder beside the log for the stacks of a command that stood still."""
SILENCE_S = 600.0
"""Seconds without a line of output after which the caller is told."""
TAIL_LINES = 100
TAIL_BYTES = 64 * 1024

PYTHON_WARNING = re.compile(r"\S+\.py:\d+: \w*Warning: ")

_MARK = "MCORE_FLOWS_LAUNCH"
"""Environment variable with a random value for each launch: finds what a killed supervisor left behind."""


def run(
    argv: Sequence[str | Path],
    *,
    log_path: Path,
    error_file: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float | None = None,
    stall_timeout_s: float | None = None,
    progress: Sequence[Path] = (),
    grace_s: float = GRACE_S,
    lease: Lease | None = None,
    reattach_s: float = 0.0,
    devices: Request | None = None,
    on_line: Callable[[str], None] | None = None,
    on_tick: Callable[[], None] | None = None,
) -> None:
    """Run a command to its end.

    If anything is raised meanwhile (a cancel, Ctrl-C, an error of a callback), the command's tree is ended first. After
    Ctrl-C that is waited for as long as it may take; a second one leaves it to the supervisor.

    Args:
        argv: The command.
        log_path: File that all its output is appended to.
        error_file: Where the command leaves its error document (`mcore/child.py`).
        env: Further environment variables.
        cwd: Its working directory.
        timeout_s: Seconds it may take.
        stall_timeout_s: Seconds in which nothing of `progress` may change; then its stacks are written beside the log.
        progress: Files and folders that change while it comes further.
        grace_s: Seconds its processes get to end by themselves when they are asked to.
        lease: The lease that it works under. If a supervisor of a former holder is at just this command, that is
            followed to its end in place of a start.
        reattach_s: Seconds that it goes on if this process is lost, so that another may follow it.
        devices: Devices that it needs; waited for, and held while it lives. CUDA_VISIBLE_DEVICES names them then.
        on_line: Gets a sample of the lines of output, as they come.
        on_tick: Called several times a second while the command runs.

    Raises:
        PipelineError: What the command itself raised, as the same class.
        InfrastructureError: It was killed, stood still, or some of its processes were lost.
        LaunchError: It ended otherwise than well, or took too long.
    """
    words = [os.fspath(word) for word in argv]
    name, command = _name(words), command_digest(words, log_path.parent)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    work = None if lease is None else attach(lease, command, on_tick)
    if work is not None:
        execution = _follow(work, log_path, on_tick)
        (on_line or _nobody)(f"going on with {name}, which is under way in process {work.supervisor.pid}")
    else:
        error_file.unlink(missing_ok=True)
        options: dict[str, object] = {
            "--grace-s": grace_s, "--timeout-s": timeout_s, "--stall-timeout-s": stall_timeout_s,
            "--stacks": log_path.with_name(STACKS), "--error-file": error_file, "--command-digest": command,
            "--reattach-s": reattach_s, "--devices": None if devices is None else devices.to_json(),
        }  # fmt: skip
        if lease is not None:
            options |= {"--lease": lease.folder, "--token": lease.claim.token}
        orders = [f"{name}={value}" for name, value in options.items() if value is not None]
        orders += [f"--progress={path}" for path in progress]
        execution = _start(words, orders, log_path, error_file, cwd, env)
    process = execution.process
    tell = on_line or _nobody
    sampler = LineSampler(execution.log_path, execution.seen, lambda line: tell(redacted(line, env or {})))
    try:
        with _hear_ctrl_c() as heard:
            _watch(process, sampler, on_tick, must_stop=heard)
    except KeyboardInterrupt:  # somebody waits and sees what is being saved; if Ctrl-C comes again, nobody
        process.terminate()
        _watch(process, sampler, wait_s=grace_s + supervise.LEFTOVER_GRACE_S + supervise.KILL_WAIT_S)
        raise
    except BaseException:
        _end(process, LEAVE_S)
        raise
    sampler.read(final=True)
    returncode = process.returncode
    assert returncode is not None
    if returncode < 0:
        _kill_marked(execution.mark)
        redact_file(execution.log_path, execution.offset, env or {})  # which the supervisor would have done
    tail = tail_of(execution.log_path, execution.offset)
    record = read_record(execution.record_file)
    if record is not None and record.cause in {"timeout", "stalled"}:
        raise _limit_error(name, record, timeout_s if record.cause == "timeout" else stall_timeout_s, tail)
    if returncode != 0:
        raise _error(name, returncode, execution.log_path, tail, execution.error_file)


@dataclass(frozen=True, slots=True)
class _Execution:
    """A supervisor at work: from `offset` on its command's output is in the log, of which `seen` bytes are old news."""

    process: subprocess.Popen[bytes] | Attached
    log_path: Path
    offset: int
    seen: int
    record_file: Path
    error_file: Path
    mark: str


def _start(
    words: Sequence[str], orders: Sequence[str], log_path: Path, error_file: Path, cwd: Path | None,
    env: Mapping[str, str] | None,
) -> _Execution:  # fmt: skip
    mark = uuid.uuid4().hex
    record_file = log_path.with_name(RECORD)
    record_file.unlink(missing_ok=True)
    with log_path.open("a") as log:
        log.write(f"$ {shlex.join(words)}\n")
        log.flush()
        start = log.tell()
        whose = {"--parent": os.getpid(), "--record": record_file, "--log": log_path, "--log-offset": start}
        process = subprocess.Popen(
            [sys.executable, "-I", Path(supervise.__file__).with_name("__main__.py"),
             *(f"{name}={value}" for name, value in whose.items()), *orders, "--", *words],
            env={**without_prefect_secrets(os.environ), "PYTHONUNBUFFERED": "1", **QUIET_ENVIRONMENT, **(env or {}),
                 ERROR_FILE_VARIABLE: os.fspath(error_file), _MARK: mark},
            cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return _Execution(process, log_path, start, start, record_file, error_file, mark)


def _follow(work: Work, log_path: Path, on_tick: Callable[[], None] | None) -> _Execution:
    """The execution that a former holder's supervisor has under way, with its log wherever that is."""
    record_file, attached = Path(work.record), Attached(work)
    while (record := read_record(record_file)) is None or record.supervisor != work.supervisor:
        with suppress(subprocess.TimeoutExpired):  # it has only just started, or waits for devices
            attached.wait(POLL_S)
            break
        if on_tick is not None:
            on_tick()
    its_log, offset = (Path(record.log), record.log_offset) if record is not None else (log_path, 0)
    with log_path.open("a") as log:
        log.write(f"went on with process {work.supervisor.pid}; its output is in {its_log}\n")
    mark = environment_of(work.supervisor.pid).get(_MARK.encode(), b"none").decode()
    seen = its_log.stat().st_size if its_log.exists() else 0
    return _Execution(attached, its_log, offset, seen, record_file, Path(work.error_file), mark)


def _nobody(line: str) -> None:
    """Nobody listens."""


@contextmanager
def _hear_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C for whoever asks whether it came, where Python would raise it on the spot.

    On the spot may be a callback deep in a library that drops what is raised in it, and then nobody has heard it.
    """
    came = False

    def keep(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup and other handlers stay
    )
    if is_ours:
        signal.signal(signal.SIGINT, keep)
    try:
        yield lambda: came
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _watch(
    process: subprocess.Popen[bytes] | Attached,
    sampler: LineSampler,
    on_tick: Callable[[], None] | None = None,
    *,
    wait_s: float = float("inf"),
    must_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Wait for the end, but no longer than `wait_s`.

    Raises:
        KeyboardInterrupt: `must_stop` says so.
    """
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            process.wait(timeout=POLL_S)
            return
        except subprocess.TimeoutExpired:
            sampler.read()
            if on_tick is not None:
                on_tick()
        if must_stop():
            raise KeyboardInterrupt


def _end(process: subprocess.Popen[bytes] | Attached, wait_s: float) -> None:
    process.terminate()
    try:
        process.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        return  # the supervisor goes on ending its tree, and is seen in the lease until it has


def _limit_error(name: str, record: Record, limit_s: float | None, tail: str) -> PipelineError:
    """What it means that the supervisor ended the command at a limit."""
    if record.cause == "timeout":
        return LaunchError(f"{name} took longer than {limit_s:g} s and was ended", log_path=record.log, tail=tail)
    stacks = [Problem(record.stacks, fix="Where each of its processes stood.")] if record.stacks else []
    return InfrastructureError(
        f"{name} stood still for {limit_s:g} s and was ended", stacks, returncode=record.status,
        log_path=record.log, tail=tail,
    )  # fmt: skip


def _error(name: str, returncode: int, log_path: Path, tail: str, error_file: Path) -> PipelineError:
    """What an exit status other than 0 means."""

    def infrastructure(what: str, status: int, problems: Iterable[Problem] = ()) -> PipelineError:
        return InfrastructureError(f"{name} {what}", problems, returncode=status, log_path=log_path, tail=tail)

    if returncode < 0:
        return infrastructure(f"lost its supervisor ({_signal_name(-returncode)})", returncode)
    try:
        reported = error_from_json(error_file.read_text())
    except (OSError, ValueError):
        reported = None
    lost = _lost_rank(tail)
    # The ranks that a lost one leaves behind may well report that, and it looks like a defect of theirs.
    if lost and (reported is None or type(reported) is PipelineError):
        return infrastructure(f"lost a process ({_signal_name(lost)})", -lost, reported.problems if reported else ())
    if reported is not None:
        return reported
    if returncode > 128:
        return infrastructure(f"was ended by {_signal_name(returncode - 128)}", 128 - returncode)
    if returncode == EXIT_RESUME:
        return StoppedError(
            f"{name} saved and left on request; started again, it goes on from there",
            returncode=returncode, log_path=log_path, tail=tail,
        )  # fmt: skip
    if returncode == EXIT_INPUT:
        return InputError(f"{name} refused its input", [f"its last lines:\n{tail}"])
    if returncode == EXIT_GATE:
        return GateError(f"the gate of {name} said no", [f"its last lines:\n{tail}"])
    return LaunchError(
        f"{name} ended with exit status {returncode}", returncode=returncode, log_path=log_path, tail=tail
    )


def _lost_rank(tail: str) -> int | None:
    """The signal that a rank was lost to, by torchrun's summary; None if all ended by themselves or were asked to."""
    numbers = {int(number) for number in re.findall(r"^\s*exitcode\s*: -(\d+) \(pid: \d+\)", tail, re.MULTILINE)}
    return min(numbers - {signal.SIGTERM}, default=None)


class LineSampler:
    """Hands on the lines of a growing file, but no flood: a burst, then a few a second, and how many were left out.

    Warnings of Python libraries stay in the file: there are dozens at every start, and none is about the run.

    Args:
        path: The file.
        offset: Bytes to skip.
        on_line: Gets each line.
        burst: Lines that go through at once.
        per_s: Lines a second after that.
    """

    def __init__(
        self, path: Path, offset: int, on_line: Callable[[str], None], *, burst: int = 40, per_s: float = 1.0
    ) -> None:
        self._path = path
        self._offset = offset
        self._on_line = on_line
        self._burst = burst
        self._per_s = per_s
        self._allowance = float(burst)
        self._rest = b""
        self._left_out = 0
        self._behind_warning = False
        self._last_refill = self._last_output = time.monotonic()

    def read(self, *, final: bool = False) -> None:
        """Take what is new; `final` also takes a last line without an end."""
        now = time.monotonic()
        self._allowance = min(self._burst, self._allowance + (now - self._last_refill) * self._per_s)
        self._last_refill = now
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if final and self._rest:
            lines.append(self._rest)
        for line in lines:
            # Of a progress bar, which draws over itself, only what is seen in the end.
            self._pass_on(line.decode(errors="replace").rstrip().rpartition("\r")[2])
        if new:
            self._last_output = now
        elif now - self._last_output >= SILENCE_S:
            self._on_line(f"no output for {SILENCE_S:.0f} s")
            self._last_output = now
        if final:
            self._tell_left_out()

    def _pass_on(self, line: str) -> None:
        if not line or self._is_of_a_warning(line):
            return
        if self._allowance < 1:
            self._left_out += 1
            return
        self._tell_left_out()
        self._allowance -= 1
        self._on_line(line)

    def _is_of_a_warning(self, line: str) -> bool:
        """Whether Python's warnings module wrote this: where and what, and below it the line of source, indented."""
        before, self._behind_warning = self._behind_warning, bool(PYTHON_WARNING.match(line))
        return self._behind_warning or (before and line.startswith("  "))

    def _tell_left_out(self) -> None:
        if self._left_out:
            self._on_line(f"… {self._left_out} lines left out, all are in {self._path}")
            self._left_out = 0


def tail_of(path: Path, offset: int = 0) -> str:
    """The last lines of a log file, from `offset` on."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return redacted("\n".join(text.splitlines()[-TAIL_LINES:]))


def _kill_marked(mark: str) -> None:
    """End what a supervisor that was killed left behind; its children are nobody's descendants any more."""
    for pid in all_pids():
        if environment_of(pid).get(_MARK.encode()) == mark.encode():
            send(signal.SIGKILL, [pid])


def _name(words: Sequence[str]) -> str:
    """`mcore.bridge convert` for `python -m mcore.bridge convert --hf …`."""
    for index, word in enumerate(words):
        if word.startswith("mcore.") and words[index - 1] == "-m":
            command = words[index + 1 : index + 2]
            return " ".join([word, *command]) if command and command[0].isalpha() else word
    return Path(words[0]).name


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
