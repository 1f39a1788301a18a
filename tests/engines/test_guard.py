"""Programs under guard: their ends, their orphans, and the end of their guard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.engines import guard
from deepseek_api_compat.engines.lifeline import Lifeline

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")

STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
# An engine with a child in its own session, as vLLM's and Ray's workers may be, and one in its group.
FAMILY = """
import os, signal, subprocess, sys, time
{first}
child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
pids = [subprocess.Popen([sys.executable, "-c", child], start_new_session=own).pid for own in (True, False)]
open(sys.argv[1] + ".part", "w").write(" ".join(map(str, [os.getpid(), *pids])))
os.rename(sys.argv[1] + ".part", sys.argv[1])
{then}
"""


def eventually(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within 30 s")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Guarded:
    """A program under guard, and the process ids that it wrote down."""

    def __init__(self, folder: Path, first: str = "", then: str = "signal.pause()") -> None:
        self.file = folder / "pids"
        self.lifeline = Lifeline()
        program = [sys.executable, "-c", FAMILY.format(first=first, then=then), str(self.file)]
        self.process = subprocess.Popen(
            guard.command(program, self.lifeline.fd),
            pass_fds=[self.lifeline.fd],
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def family(self) -> list[int]:
        eventually(self.file.exists, "the program began")
        return [int(pid) for pid in self.file.read_text().split()]

    def close(self) -> None:
        self.lifeline.close()
        self.process.wait(30)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    made: list[Guarded] = []

    def make(*args: str) -> Guarded:
        made.append(Guarded(tmp_path, *args))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_nothing_outlives_the_holder_of_the_lifeline(start: Callable[..., Guarded]) -> None:
    guarded = start(STUBBORN)
    family = guarded.family()
    assert sorted(guard.descendants(guarded.process.pid)) == sorted(family)
    guarded.lifeline.close()
    assert guarded.process.wait(30) != 0
    eventually(lambda: all(map(gone, family)), "all are gone")


def test_sigterm_is_passed_on_and_what_the_program_leaves_is_killed(start: Callable[..., Guarded]) -> None:
    leave = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))"
    guarded = start(leave, "while True: time.sleep(1)")
    family = guarded.family()
    guarded.process.terminate()
    assert guarded.process.wait(30) == 0
    eventually(lambda: all(map(gone, family)), "all are gone")


def test_exit_code_and_orphans_of_a_program_that_ends_by_itself(start: Callable[..., Guarded]) -> None:
    guarded = start("", "sys.exit(2)")
    family = guarded.family()
    assert guarded.process.wait(30) == 2
    eventually(lambda: all(map(gone, family)), "all are gone")


def test_a_program_that_is_killed_is_named(start: Callable[..., Guarded]) -> None:
    guarded = start()
    os.kill(guarded.family()[0], signal.SIGKILL)
    assert guarded.process.wait(30) == 128 + signal.SIGKILL
    assert guarded.process.stderr is not None
    assert b"was killed by signal 9" in guarded.process.stderr.read()


def test_the_program_dies_with_a_killed_guard(start: Callable[..., Guarded]) -> None:
    guarded = start()
    engine = guarded.family()[0]
    guarded.process.kill()
    guarded.process.wait(30)
    eventually(lambda: gone(engine), "the program is gone")
    for pid in guarded.family()[1:]:  # these are the supervisor's to kill, by their group; one has its own
        os.kill(pid, signal.SIGKILL)


def test_a_program_that_is_not_there_and_a_socket_in_the_way(tmp_path: Path) -> None:
    socket = tmp_path / "e.sock"
    socket.touch()
    lifeline = Lifeline()
    argv = guard.command(["/no/such/program", "--flag"], lifeline.fd, str(socket))
    done = subprocess.run(argv, pass_fds=[lifeline.fd], capture_output=True, text=True, timeout=60)
    lifeline.close()
    assert (done.returncode, done.stderr) == (2, "Can't start /no/such/program: No such file or directory.\n")
    assert not socket.exists()


def test_a_process_that_has_ended_has_no_descendants():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert guard.descendants(process.pid) == []
