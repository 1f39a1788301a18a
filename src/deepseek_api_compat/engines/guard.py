"""Runs another program that must not outlive the service: `python -m ...guard --lifeline=FD -- PROGRAM`.

For engines that know nothing of our lifeline and have children of their own. The guard waits for its program,
passes SIGTERM on, and ends with its exit code; it kills whatever the program started and left behind, also in
process groups of their own, when the program ends and when the holder of the lifeline is gone. If the guard
itself is killed, the program is too (Linux), and its supervisor kills the group.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def command(program: Sequence[str], lifeline: int, socket: str | None = None) -> list[str]:
    """The command line that runs `program` under a guard.

    socket: a path that is cleared before, of what a killed predecessor left there.
    """
    guard = [sys.executable, "-m", "deepseek_api_compat.engines.guard", f"--lifeline={lifeline}"]
    return [*guard, *([f"--socket={socket}"] if socket else []), "--", *program]


def main() -> None:
    parser = argparse.ArgumentParser(prog="guard")
    parser.add_argument("--lifeline", type=int, required=True, metavar="FD")
    parser.add_argument("--socket", type=Path)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args()
    program: list[str] = options.program
    if options.socket is not None:
        options.socket.unlink(missing_ok=True)
    linux = sys.platform == "linux"
    prctl = ctypes.CDLL(None).prctl if linux else None
    if prctl is not None:
        # Orphans of the program become our children, so that they can be found.
        prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def in_the_child() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    try:
        # The child's first steps are few and take no lock: this process has one thread so far.
        child = subprocess.Popen(program, preexec_fn=in_the_child, close_fds=True)
    except OSError as error:
        sys.stderr.write(f"Can't start {program[0]}: {error.strerror}.\n")
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    holder_gone = threading.Event()
    threading.Thread(target=_die_at_eof, args=(options.lifeline, holder_gone), daemon=True).start()
    code = child.wait()
    kill_descendants()
    if holder_gone.is_set():  # then the other thread killed the program and may have taken its exit code
        os._exit(1)
    if code < 0:
        sys.stderr.write(f"{program[0]} was killed by signal {-code}.\n")
    sys.exit(code if code >= 0 else 128 - code)


def _die_at_eof(fd: int, holder_gone: threading.Event) -> None:
    while os.read(fd, 1):
        pass
    holder_gone.set()
    kill_descendants()
    os._exit(1)


def kill_descendants() -> None:
    """Kill every descendant of this process, until there is none. Without /proc: this process's group."""
    if not Path("/proc/self/task").exists():
        os.killpg(0, signal.SIGKILL)
    while found := descendants(os.getpid()):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # zombies are descendants too
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def descendants(pid: int) -> list[int]:
    """The process ids of all children of a process, and of theirs. None without /proc."""
    found: list[int] = []
    todo = [pid]
    while todo:
        threads: list[Path] = []
        with suppress(OSError):  # it has just ended
            threads += Path(f"/proc/{todo.pop()}/task").iterdir()
        for thread in threads:
            with suppress(OSError):
                todo += (new := [int(child) for child in (thread / "children").read_text().split()])
                found += new
    return found


if __name__ == "__main__":
    main()
