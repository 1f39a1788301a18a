"""A supervised child process: started, waited for, started again when it dies, stopped for good.

                 start()
    stopped ---------------> starting ---- ready ----> ready
       ^                     |   ^                       |
       |                exit |   | after the delay  exit |
       |                     v   |                       |
       |                     backoff <-------------------+
       |                        |
       |                        | too often in a row, or no hope
       |      stop()            v
       +----- stopping       failed
              (from any state)

    starting   the process runs (or is about to) and does not answer yet
    ready      it answers; `info` says what it is
    backoff    it died; the next start comes after a delay
    failed     given up; `detail` has the end of its log. `start()` tries afresh
    stopping   it was told to leave
    stopped    no process, and none wanted

One task owns the state; everybody else asks with `start()`, `stop()` and `until()`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from deepseek_api_compat.engines.base import ModelInfo
from deepseek_api_compat.engines.guard import descendants
from deepseek_api_compat.errors import ApiError, EngineFailed

State = Literal["starting", "ready", "backoff", "failed", "stopping", "stopped"]

USAGE_ERROR = 2  # exit code of a program that can't do what its command line asks: another try is no use
READY_POLL = 0.02  # seconds between two questions whether it is ready
LOG_CHECK = 30.0  # seconds between two looks at the size of the log
LOG_CAP = 8 * 1024 * 1024  # bytes; one older log of that size is kept beside it
TAIL_LINES = 12


class Unfit(EngineFailed):
    """It answers, but must not be used, and no new start would change that: raised by `ready`."""


class Backoff(msgspec.Struct, frozen=True):
    """How long to wait before another start: `first` seconds, doubled with each quick failure, up to `most`.

    A process that was ready for `healthy` seconds starts the count anew. After `tries` quick failures
    in a row there is no further start.
    """

    first: float = 0.2
    most: float = 30.0
    healthy: float = 60.0
    tries: int = 8

    def delay(self, failures: int) -> float:
        return min(self.first * 2.0 ** min(failures - 1, 60), self.most)


class _End(NamedTuple):
    """How one life ended: why, whether it was a long and healthy one, whether another is no use."""

    why: str
    healthy: bool
    hopeless: bool


class ManagedProcess:
    """Runs `argv` in a process group of its own, with stdout and stderr appended to `log`.

    ready: asked again and again until it returns what the process serves; ApiError and OSError mean
        "not yet". It has `start_timeout` seconds in all.
        Unfit leads to `failed`.
    pass_fds: file descriptors that the child inherits (its lifeline).
    on_change: called with this object, in the event loop, after each change of state.

    Failure policy: whatever ends the process (crash, exit code 0, no answer in time) leads to a restart
    as `Backoff` says; exit code 2 leads to `failed` at once. The whole group is killed after each life, so
    that no grandchild keeps a GPU or a socket.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        ready: Callable[[], Awaitable[ModelInfo]],
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        start_timeout: float = 600.0,
        backoff: Backoff | None = None,
        on_change: Callable[[ManagedProcess], None] | None = None,
    ) -> None:
        self.argv = list(argv)
        self.log = log
        self.state: State = "stopped"
        self.detail = ""
        self.pid: int | None = None
        self.started = 0.0  # Unix time of the last start
        self.info: ModelInfo | None = None
        self._ready = ready
        self._env = env
        self._pass_fds = tuple(pass_fds)
        self._start_timeout = start_timeout
        self._backoff = backoff or Backoff()
        self._on_change = on_change
        self._grace = 0.0
        self._leave = asyncio.Event()
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run it, anew if it has failed; no effect while it runs, waits or leaves."""
        self._asked.set()
        if self._task is None or self._task.done():
            self._leave.clear()
            self._task = asyncio.get_running_loop().create_task(self._run())

    def kill(self) -> None:
        """End this life at once, as of a process that hangs; the next one begins as after any death."""
        if self.pid is not None:
            _kill_family(self.pid)

    async def stop(self, grace: float = 5.0) -> None:
        """SIGTERM, SIGKILL after `grace` seconds; returns when the process is gone."""
        if self._task is not None:
            self._grace = grace
            self._leave.set()
            self._asked.set()
            # Shielded: a caller that gives up waiting must not leave a process behind.
            await asyncio.shield(self._task)

    def memory(self) -> int:
        """Bytes of RAM that the process and all its children hold; what they share counts for each."""
        if self.pid is None:
            return 0
        return sum(map(_resident, [self.pid, *descendants(self.pid)]))

    async def until(self, *states: State) -> State:
        """Wait until the state is one of `states`. One that lasts only a moment may be missed."""
        while self.state not in states:
            await self._changed.wait()
        return self.state

    # From here on: the owning task.

    def _set(self, state: State, detail: str = "") -> None:
        self.state, self.detail = state, detail
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_change is not None:
            self._on_change(self)

    async def _run(self) -> None:
        failures = 0
        while not self._leave.is_set():
            end = await self._live()
            if self._leave.is_set():
                break
            failures = 1 if end.healthy else failures + 1
            if end.hopeless or failures >= self._backoff.tries:
                self._asked.clear()
                self._set("failed", end.why)
                await self._asked.wait()
                failures = 0
            else:
                self._set("backoff", end.why)
                await self._pause(self._backoff.delay(failures))
        self._set("stopped")

    async def _live(self) -> _End:
        """One life of the process, from its start until its group is gone."""
        self._set("starting", self.detail)
        try:
            process = await self._spawn()
        except OSError as error:
            return _End(f"Can't start {self.argv[0]}: {error.strerror}.", healthy=False, hopeless=True)
        self.pid, self.started = process.pid, time.time()
        exit_: asyncio.Future[Any] = asyncio.ensure_future(process.wait())
        leave: asyncio.Future[Any] = asyncio.ensure_future(self._leave.wait())
        clock = asyncio.get_running_loop().time
        began = clock()
        healthy = hopeless = False
        try:
            problem, hopeless = await self._until_ready(exit_, leave)
            if not problem and not exit_.done() and not leave.done():
                ready = clock()
                self._set("ready")
                await self._watch(exit_, leave)
                healthy = clock() - ready >= self._backoff.healthy
            if leave.done():
                self._set("stopping")
                _signal_group(process.pid, signal.SIGTERM)
                await asyncio.wait({exit_}, timeout=self._grace)
        finally:
            leave.cancel()
            # Also after an exit, for its children: the number stays taken while the group has a member.
            _kill_family(process.pid)
            code = await exit_
            self.pid = self.info = None
        if not problem:
            end = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            problem = f"The process {end} after {clock() - began:.1f} s."
        tail = await asyncio.to_thread(_tail, self.log)
        return _End(f"{problem}\n{tail}".rstrip(), healthy, hopeless or code == USAGE_ERROR)

    async def _spawn(self) -> asyncio.subprocess.Process:
        log = await asyncio.to_thread(_open_log, self.log)
        try:
            return await asyncio.create_subprocess_exec(
                *self.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                pass_fds=self._pass_fds,
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _until_ready(self, exit_: asyncio.Future[Any], leave: asyncio.Future[Any]) -> tuple[str, bool]:
        """Why it is not ready ("" when it is, has died or must leave), and whether it never will be."""
        answers: list[str] = []
        asking = asyncio.ensure_future(self._ask(answers))
        try:
            await asyncio.wait(
                {asking, exit_, leave}, timeout=self._start_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if asking.done():
                self.info = asking.result()
            elif not exit_.done() and not leave.done():
                last = answers[-1] if answers else "it gives no answer"
                return f"The process was not ready within {self._start_timeout:g} s: {last}", False
            return "", False
        except Unfit as error:
            return str(error), True
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _ask(self, answers: list[str]) -> ModelInfo:
        while True:
            try:
                return await self._ready()
            except Unfit:
                raise
            except (ApiError, OSError) as error:
                answers[:] = [str(error)]
            await asyncio.sleep(READY_POLL)

    async def _pause(self, seconds: float) -> None:
        leave = asyncio.ensure_future(self._leave.wait())
        await asyncio.wait({leave}, timeout=seconds)
        leave.cancel()

    async def _watch(self, exit_: asyncio.Future[Any], leave: asyncio.Future[Any]) -> None:
        """Wait for the end, and keep the log from filling the disk meanwhile."""
        while True:
            done, _ = await asyncio.wait(
                {exit_, leave}, timeout=LOG_CHECK, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return
            await asyncio.to_thread(_trim, self.log)


def _signal_group(pid: int, number: int) -> None:
    # PermissionError is macOS's answer for a group of which only a zombie is left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _kill_family(pid: int) -> None:
    """Kill the process, its group, and its descendants that have groups of their own."""
    family = descendants(pid)
    _signal_group(pid, signal.SIGKILL)
    for child in family:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _resident(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _open_log(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    _trim(path)
    return fd


def _trim(path: Path) -> None:
    """Copy a log that is too long to its `.1` and empty it. In place, because the child has it open."""
    with suppress(OSError):
        if path.stat().st_size > LOG_CAP:
            with path.open("rb") as log:
                log.seek(-LOG_CAP, os.SEEK_END)
                path.with_name(path.name + ".1").write_bytes(log.read(LOG_CAP))
            os.truncate(path, 0)


def _tail(path: Path) -> str:
    """The last lines of the log."""
    with suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
    return ""
