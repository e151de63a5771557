"""Stage commands in the terminal: the child has the keyboard's Ctrl-C, the screen, and the last word on the status."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from mcore.child import QUIET_ENVIRONMENT
from mcore.errors import ConfigError, Problem
from mcore.supervise import PR_SET_PDEATHSIG


def become(argv: Sequence[object]) -> NoReturn:
    """Turn this process into a command.

    Raises:
        ConfigError: There is no such program.
    """
    words = [str(word) for word in argv]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(words[0], words, _environment())
    except OSError as exc:
        raise _not_started(words[0], exc) from exc


def run_in_terminal(
    argv: Sequence[object],
    env: Mapping[str, str] | None = None,
    *,
    quiet: bool = False,
    saves: bool = False,
    pass_fds: Sequence[int] = (),
) -> int:
    """Run a command to its end, where something is left to do behind it.

    Ctrl-C reaches the child by the terminal and a SIGTERM is handed on; this process waits for what the child makes of
    it.

    Args:
        argv: The command.
        env: Further environment variables.
        quiet: Leave its standard output out.
        saves: It saves when it is asked to stop. So it gets a session of its own, where Ctrl-C can't end the helpers
            that it saves with, and a SIGTERM in place of Ctrl-C, of the terminal's end, and if this process is killed.
        pass_fds: Descriptors that it inherits, as of locks that are to last as long as it lives.

    Returns:
        Its exit status, or 128 plus the signal that ended it.

    Raises:
        ConfigError: There is no such program.
    """
    words = [str(word) for word in argv]
    sys.stdout.flush()
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if started:
            started[0].send_signal(signal.SIGTERM)
        else:
            early.append(number)

    def left_to_the_child(number: int, frame: FrameType | None) -> None:
        """The terminal sends it to the child as well; were it ignored here, the child would ignore it too."""

    # Before the start: the child may be up, and a signal on its way, before this process comes to its next line.
    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: hand_on}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # in the background
        handlers[signal.SIGINT] = hand_on if saves else left_to_the_child
    if saves and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup stays nohup
        handlers[signal.SIGHUP] = hand_on
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        process = subprocess.Popen(
            words,
            env={**_environment(), **(env or {})},
            stdout=subprocess.DEVNULL if quiet else None,
            start_new_session=saves,
            pass_fds=pass_fds,
            preexec_fn=_end_with_parent if saves else None,
        )
        started.append(process)
        if early:
            process.send_signal(signal.SIGTERM)
        status = process.wait()
    except OSError as exc:
        raise _not_started(words[0], exc) from exc
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def go_on_in_own_session() -> None:
    """Return in a child process that has a session of its own; this process waits for its end and ends likewise.

    Ctrl-C in a terminal reaches every process of a session's foreground group at once. Prefect's embedded server would
    be among them, and a run that is being ended could tell nobody. So the signal comes here, and is handed to the run
    alone, as a SIGTERM is. If this process is killed, the run gets a SIGTERM.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        _end_with_parent()
        if os.getppid() != parent:  # it was killed before this could be asked for
            os.kill(os.getpid(), signal.SIGTERM)
        return

    def hand_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    raise SystemExit(status if status >= 0 else 128 - status)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _environment() -> dict[str, str]:
    return dict(os.environ) | QUIET_ENVIRONMENT


def _not_started(program: str, exc: OSError) -> ConfigError:
    return ConfigError("the command can't be started", [Problem(program, "a program", exc.strerror or str(exc))])
