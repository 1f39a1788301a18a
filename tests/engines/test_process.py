"""Managed processes, with programs that start late, die, lie and refuse to leave."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.engines import process as module
from deepseek_api_compat.engines.process import Backoff, ManagedProcess
from fakes.engine_process import command, question

QUICK = Backoff(first=0.01, most=0.02, tries=3)


class History:
    """A managed process made to order, and the states it went through."""

    def __init__(self, tmp_path: Path, socket_path: Path) -> None:
        socket_path.parent.mkdir()
        self.socket = socket_path
        self.log = tmp_path / "logs" / "engine.log"
        self.states: list[str] = []
        self.made: list[ManagedProcess] = []

    def process(self, *options: str, **settings: Any) -> ManagedProcess:
        process = ManagedProcess(
            command(self.socket, *options),
            log=self.log,
            ready=question(self.socket),
            on_change=lambda process: self.states.append(process.state),
            **{"backoff": QUICK, **settings},
        )
        self.made.append(process)
        return process


@pytest.fixture
async def history(tmp_path: Path, socket_path: Path) -> AsyncIterator[History]:
    history = History(tmp_path, socket_path)
    yield history
    for process in history.made:
        await process.stop(grace=0)


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Poll for what no event tells: other processes."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_start_ready_stop(history: History) -> None:
    process = history.process("--slow=0.1")
    assert process.state == "stopped"
    process.start()
    process.start()
    await process.until("ready")
    assert process.info is not None
    assert process.info.context == 1024
    pid = process.pid
    assert pid is not None
    await process.stop()
    assert history.states == ["starting", "ready", "stopping", "stopped"]
    assert gone(pid)
    assert process.pid is None
    await process.stop()
    process.start()
    assert await process.until("ready", "failed") == "ready"


async def test_killed_process_comes_back(history: History) -> None:
    process = history.process()
    process.start()
    for _ in range(2):
        await process.until("ready")
        pid = process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await process.until("backoff")
        assert process.detail.startswith("The process was killed by signal 9")
    await process.until("ready")
    assert process.pid != pid
    assert history.states == ["starting", "ready", "backoff"] * 2 + ["starting", "ready"]


async def test_quick_failures_in_a_row_end_in_failed_with_the_log(history: History) -> None:
    process = history.process("--crash=7")
    process.start()
    await process.until("failed")
    assert history.states == ["starting", "backoff"] * 2 + ["starting", "failed"]
    assert "exited with code 7" in process.detail
    assert process.detail.splitlines()[-1].startswith("engine: no luck, pid")
    assert history.log.read_text().count("no luck") == 3
    process.start()
    await process.until("starting")
    await process.until("failed")
    assert history.log.read_text().count("no luck") == 6
    await process.stop()
    assert process.state == "stopped"


async def test_a_long_healthy_life_starts_the_count_anew(history: History) -> None:
    process = history.process("--serve=1", backoff=Backoff(first=0.001, healthy=0.0, tries=2))
    process.start()
    await until(lambda: history.states.count("ready") == 4)
    assert "failed" not in history.states


async def test_usage_error_is_not_tried_again(history: History) -> None:
    process = history.process("--crash=2")
    process.start()
    await process.until("failed")
    assert history.states == ["starting", "failed"]


async def test_program_that_is_not_there(history: History) -> None:
    process = history.process()
    process.argv[0] = "/nonexistent/engine"
    process.start()
    await process.until("failed")
    assert process.detail == "Can't start /nonexistent/engine: No such file or directory."


async def test_healthy_but_wrong_never_gets_ready(history: History) -> None:
    process = history.process("--say=hello", start_timeout=8.0, backoff=Backoff(tries=1))
    process.start()
    await process.until("failed")
    assert history.states == ["starting", "failed"]
    assert "not ready within 8 s: it says b'hello\\n'" in process.detail


async def test_sigterm_ignored(history: History) -> None:
    process = history.process("--stubborn")
    process.start()
    await process.until("ready")
    pid = process.pid
    assert pid is not None
    await process.stop(grace=0.1)
    assert gone(pid)
    assert history.states[-2:] == ["stopping", "stopped"]


@pytest.mark.parametrize("how", ["stop", "crash"])
async def test_the_whole_group_goes(history: History, tmp_path: Path, how: str) -> None:
    process = history.process(f"--child={tmp_path / 'pid'}", backoff=Backoff(first=60))
    process.start()
    await process.until("ready")
    child = int((tmp_path / "pid").read_text())
    assert not gone(child)
    if how == "stop":
        await process.stop()
    else:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await process.until("backoff")
    await until(lambda: gone(child))


@pytest.mark.parametrize("state", ["starting", "backoff"])
async def test_stop_does_not_wait(history: History, state: Any) -> None:
    options = ["--slow=60"] if state == "starting" else ["--crash=1"]
    process = history.process(*options, backoff=Backoff(first=60))
    process.start()
    await process.until(state)
    await asyncio.wait_for(process.stop(), 5)
    assert process.state == "stopped"


async def test_stop_given_up_by_its_caller_still_happens(history: History) -> None:
    process = history.process("--stubborn")
    process.start()
    await process.until("ready")
    stopping = asyncio.ensure_future(process.stop(grace=0.2))
    await process.until("stopping")
    stopping.cancel()
    await process.until("stopped")


async def test_log_is_capped(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_CAP", 8000)
    monkeypatch.setattr(module, "LOG_CHECK", 0.01)
    process = history.process("--chatty=100000")
    process.start()
    await process.until("ready")
    await until(lambda: history.log.stat().st_size == 0)
    old = history.log.with_name("engine.log.1").read_text()
    assert len(old) == 8000
    assert old.endswith("y\n")


def test_backoff_doubles_up_to_the_most() -> None:
    assert [Backoff().delay(n) for n in (1, 2, 3, 8, 9, 2000)] == [0.2, 0.4, 0.8, 25.6, 30.0, 30.0]


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.process import ManagedProcess
from fakes.engine_process import command, question

async def main(path, log, options):
    lifeline = Lifeline()
    process = ManagedProcess(
        command(path, f"--lifeline={lifeline.fd}", *options),
        log=log, ready=question(path), pass_fds=[lifeline.fd],
    )
    process.start()
    await process.until("ready")
    print(process.pid, flush=True)
    await process.until("failed")

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
"""


@pytest.mark.parametrize("options", [[], ["--no-death-signal"]], ids=["death signal and pipe", "pipe alone"])
async def test_child_does_not_outlive_a_killed_supervisor(
    tmp_path: Path, socket_path: Path, options: list[str]
) -> None:
    socket_path.parent.mkdir()
    argv = [sys.executable, "-c", SUPERVISOR, str(socket_path), str(tmp_path / "log"), "--stubborn", *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    supervisor = await asyncio.create_subprocess_exec(*argv, env=env, stdout=asyncio.subprocess.PIPE)
    assert supervisor.stdout is not None
    child = int(await supervisor.stdout.readline())
    assert not gone(child)
    supervisor.kill()
    await until(lambda: gone(child))
    await supervisor.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
async def test_a_child_in_a_session_of_its_own_is_killed_with_what_hangs(
    history: History, tmp_path: Path
) -> None:
    program = (
        "import subprocess, sys, time;"
        "ignore = 'import signal; signal.signal(15, signal.SIG_IGN); signal.pause()';"
        "child = subprocess.Popen([sys.executable, '-c', ignore], start_new_session=True);"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)"
    )
    file = tmp_path / "pid"

    async def ready() -> Any:
        if not file.exists() or not file.read_text():
            raise OSError("not yet")
        return None

    argv = [sys.executable, "-c", program, str(file)]
    process = ManagedProcess(argv, log=history.log, ready=ready, backoff=Backoff(first=600.0, most=600.0))
    process.start()
    assert await process.until("ready", "failed") == "ready"
    child = int(file.read_text())
    assert process.memory() > 1_000_000
    process.kill()
    await until(lambda: gone(child), 30.0)
    await process.stop()
