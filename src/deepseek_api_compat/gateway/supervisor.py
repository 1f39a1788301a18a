"""The process that owns everything: engines, workers, the key store and the control socket.

It serves no request itself. A dead worker is replaced and its slots taken back; a dead engine is
restarted by its `ManagedProcess`; when the supervisor dies, all of them die.
"""

from __future__ import annotations

import asyncio
import fcntl
import io
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from deepseek_api_compat import control
from deepseek_api_compat.config import Settings
from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.gateway import channel, logs
from deepseek_api_compat.gateway.app import local_limiter, shared_cells, shared_limiter, slot_table
from deepseek_api_compat.gateway.breaker import check_fallbacks
from deepseek_api_compat.gateway.engine_admin import EngineAdmin
from deepseek_api_compat.gateway.idempotency import Answers
from deepseek_api_compat.gateway.ledger import Intake
from deepseek_api_compat.gateway.operations import Operations
from deepseek_api_compat.gateway.redis_limits import RedisLimiter
from deepseek_api_compat.gateway.renewal import Renewal
from deepseek_api_compat.gateway.replicas import Replica, WatchedUpstream, replicas_of
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.slots import wake
from deepseek_api_compat.security.admin import KeyAdmin, ensure_admin
from deepseek_api_compat.store.audit import Actor
from deepseek_api_compat.store.base import KeyRecord
from deepseek_api_compat.store.ledger_rows import LedgerRow

MAX_START_FAILURES = 3
ACK_TIMEOUT = 5.0
LOAD_AGAIN = 1.0  # seconds between two tries to read what keys have spent
LOGGED_BODIES = "log.bodies is on: what users ask is written to the log, in plain text."
logger = logging.getLogger("deepseek_api")


class WorkerProcess:
    """One worker slot: the process that fills it now and the channel to it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.started = asyncio.Event()
        self.acknowledged = 0
        self.failures = 0

    def send(self, message: channel.AnyMessage) -> None:
        if self.writer is not None:
            self.writer.write(channel.encode(message))


class Supervisor:
    """Runs until it is told to stop. One task owns each worker slot, each replica its process."""

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        admin: KeyAdmin,
        on_ready: Callable[[str | None, list[str]], None],
    ) -> None:
        """`listeners`: a bound socket for each worker.

        `on_ready` is called once, when workers accept connections and an engine can answer.

        It gets the admin key if this start made it (a start that fails before makes none), and a sentence
        for each upstream that doesn't answer yet: that is no reason to wait.
        """
        check_fallbacks({model.name: model.fallback for model in settings.models})
        self._settings = settings
        self._listeners = listeners
        self._admin = admin
        self._on_ready = on_ready
        self._run_dir = settings.data_dir / "run"
        self._started = int(time.time())
        self._keys_version = 1
        self._keys: Sequence[KeyRecord] = ()
        self._keys_changed = asyncio.Condition()
        self._publishing = asyncio.Lock()
        self._intake = Intake(settings.data_dir, settings.ledger, on_lost=self._on_lost)
        self._engine_admin = EngineAdmin(self._all_replicas, self._leases_of)
        self._operations = Operations(admin, self._intake, self._engine_admin, self._publish_keys)
        self._answering: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._answers = Answers()
        self._failure: str | None = None
        self._said_ready = False
        self._owned: list[asyncio.Task[None]] = []

        self._memory = SharedMemory.create(shared_cells(settings))
        self._slots = slot_table(settings, self._memory)
        self._limiter = local_limiter(settings, self._memory)
        self._shared_limiter = shared_limiter(settings, self._limiter)
        self._pipes = [os.pipe() for _ in range(settings.server.workers)]
        for read, write in self._pipes:
            os.set_blocking(read, False)
            os.set_blocking(write, False)
        self._workers = [WorkerProcess(index) for index in range(settings.server.workers)]
        self._replicas: list[Replica] = []
        self._lifeline = Lifeline()

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM, then drain. Raises SetupError if the service can't be kept up."""
        self._loop = loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        self._prepare_run_dir()
        logs.configure(self._settings.log, "supervisor", io.TextIOWrapper(self._open_log(), "utf-8"))
        logs.log_task_exceptions(loop)
        self._publish_certificate()
        if isinstance(self._shared_limiter, RedisLimiter):
            self._shared_limiter.start()
        server = await self._start_control()
        # After the control socket is there, so that no key made in between is missed.
        self._keys = await asyncio.to_thread(self._admin.store.list)
        self._intake.start()
        if not await self._load_limits():
            self._own(self._load_limits_late())
        self._replicas = replicas_of(self._settings, self._lifeline, self._on_replica_change)
        keepers = [self._own(self._keep_worker(worker)) for worker in self._workers]
        self._own(self._tell_of_intake())
        await asyncio.gather(*(replica.start() for replica in self._replicas))
        await self._stopping.wait()
        await self._engine_admin.close()
        await self._drain(keepers)
        server.close()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))
        self._operations.close()
        await asyncio.to_thread(self._intake.stop)
        if isinstance(self._shared_limiter, RedisLimiter):
            await self._shared_limiter.close()
        control.control_socket_path(self._settings.data_dir).unlink(missing_ok=True)
        await asyncio.gather(*self._owned)
        if self._failure:
            raise SetupError(self._failure)

    async def _tell_of_intake(self) -> None:
        """Workers say at /ready and /metrics how the ledger is doing."""
        told = self._intake.state
        while not self._stopping.is_set():
            await asyncio.sleep(1.0)
            if self._intake.state != told:
                told = self._intake.state
                for worker in self._workers:
                    worker.send(channel.Intake(told))

    async def _load_limits_late(self) -> None:
        """What was spent must not be forgotten because the disk was full at the start."""
        while not self._stopping.is_set():
            await asyncio.sleep(LOAD_AGAIN)
            if self._intake.state.problem is None and await self._load_limits():
                return

    async def _load_limits(self) -> bool:
        """What keys have used before this start counts against their budgets and days. False: not known."""
        self._intake.directory.mkdir(mode=0o700, exist_ok=True)
        day = int(time.time()) // 86400
        try:
            spent = await asyncio.to_thread(self._intake.spent)
            of_models = await asyncio.to_thread(self._intake.spent_by_model)
        except (SetupError, OSError) as error:
            # The ledger's own policy decides whether requests are served; the intake goes on trying.
            logger.error("limits: what keys have spent is not known: %s", error)
            return False
        for key in self._keys:
            if key.id in spent:
                self._limiter.load(key.slot, spent[key.id].price, day, spent[key.id].tokens_today)
        for index, model in enumerate(self._settings.models):
            if model.name in of_models:
                used = of_models[model.name]
                self._limiter.load_model(index, used.price, day, used.tokens_today)
        return True

    def _on_lost(self, rows: list[LedgerRow]) -> None:
        """In the intake's thread: locks of this process's limiter keep its own threads from nothing."""
        self._loop.call_soon_threadsafe(self._charge, rows)

    def _charge(self, rows: list[LedgerRow]) -> None:
        """Count for limits and budgets what requests of a dead worker had used.

        Those that died with the service before come before `_load_limits`, which then sets what they are in.
        """
        slots = {key.id: key.slot for key in self._keys}
        models = {model.name: index for index, model in enumerate(self._settings.models)}
        for row in rows:
            slot, model = slots.get(row.key_id), models.get(row.model)
            tokens = row.prompt_tokens + row.completion_tokens
            if isinstance(self._shared_limiter, RedisLimiter):
                self._shared_limiter.charge(row.key_id, slot, model, tokens, row.price)
            else:
                self._shared_limiter.charge(slot, model, tokens, row.price)

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it beside; should it fail, the service ends and `run` raises its error."""
        task = asyncio.create_task(work)
        self._owned.append(task)
        task.add_done_callback(self._check_owned)
        return task

    def _check_owned(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._stopping.set()

    def _prepare_run_dir(self) -> None:
        shutil.rmtree(self._run_dir, ignore_errors=True)
        (self._run_dir / "metrics").mkdir(parents=True, mode=0o700)
        self._run_dir.chmod(0o700)

    def _publish_certificate(self) -> None:
        """Workers find it where they look for it, now and after each renewal. Raises SetupError."""
        if self._settings.server.tls_cert is None:
            return
        renewal = Renewal(self._settings, self._tell_of_certificate)
        renewal.publish()
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGHUP, lambda: None if renewal.hang_up() else self._on_signal()
        )
        self._own(renewal.run(self._stopping))

    def _tell_of_certificate(self) -> None:
        for worker in self._workers:
            worker.send(channel.Certificate())

    def _on_signal(self) -> None:
        if self._stopping.is_set():  # a second Ctrl-C: no more patience
            for worker in self._workers:
                if worker.process is not None and worker.process.returncode is None:
                    worker.process.kill()
        self._stopping.set()

    # Replicas

    def _on_replica_change(self, replica: Replica) -> None:
        slots = replica.slots if replica.state == "ready" else 0
        wake(
            [write for _, write in self._pipes], self._slots.set_capacity(replica.pool, replica.number, slots)
        )
        message = channel.Engines(self._engine_states())
        for worker in self._workers:
            worker.send(message)
        self._check_ready()

    def _all_replicas(self) -> list[Replica]:
        return self._replicas

    def _leases_of(self, replica: Replica) -> int:
        return self._slots.load(replica.pool)[replica.number][0]

    def _replica(self, pool: int, number: int) -> Replica:
        return next(r for r in self._replicas if (r.pool, r.number) == (pool, number))

    def _engine_states(self) -> list[EngineState]:
        return [replica.describe() for replica in self._replicas]

    def _check_ready(self) -> None:
        if self._stopping.is_set():
            return
        up = all(worker.started.is_set() for worker in self._workers)
        answers = any(replica.state == "ready" for replica in self._replicas)
        hopes = all(isinstance(replica, WatchedUpstream) and replica.probed for replica in self._replicas)
        if up and (answers or hopes) and not self._said_ready:
            self._said_ready = True
            self._own(self._greet())
        if not self._said_ready and self._replicas and all(r.state == "failed" for r in self._replicas):
            self._failure = "No engine could be started. " + next(
                (r.detail for r in self._replicas if r.detail), ""
            )
            self._stopping.set()

    async def _greet(self) -> None:
        key = await asyncio.to_thread(ensure_admin, self._admin)
        if key:
            await self._publish_keys()
        problems = [f"{r.model}: {r.detail}" for r in self._replicas if r.detail]
        if self._settings.log.bodies:
            logger.warning("%s", LOGGED_BODIES)
            problems.append(LOGGED_BODIES)
        self._on_ready(key, problems)

    # Workers

    async def _keep_worker(self, worker: WorkerProcess) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            await self._run_worker(worker)
            self._slots.forget_worker(worker.index)
            # Everybody: the worker may have died between a grant and its wake-up.
            wake([write for _, write in self._pipes], range(len(self._pipes)))
            self._limiter.forget_worker(worker.index)
            self._intake.nudge()
            if self._stopping.is_set():
                return
            worker.failures = worker.failures + 1 if time.monotonic() - began < 5.0 else 0
            if worker.failures >= MAX_START_FAILURES and not self._said_ready:
                self._failure = f"A gateway worker can't start; see {self._log_path}."
                self._stopping.set()
                return
            await asyncio.sleep(min(5.0, 0.05 * 2**worker.failures))

    @property
    def _log_path(self) -> Path:
        return self._settings.data_dir / "logs" / "gateway.log"

    def _open_log(self) -> BinaryIO:
        self._log_path.parent.mkdir(mode=0o700, exist_ok=True)
        return open(self._log_path, "ab")

    async def _run_worker(self, worker: WorkerProcess) -> None:
        """One life of a worker, from start to exit."""
        ours, theirs = socket.socketpair()
        write_ends = [write for _, write in self._pipes]
        my_fd = self._pipes[worker.index][0]
        fds = [
            theirs.fileno(),
            self._listeners[worker.index].fileno(),
            self._memory.fd,
            self._lifeline.fd,
            my_fd,
            *write_ends,
        ]
        argv = [sys.executable, "-m", "deepseek_api_compat.gateway.worker"]
        argv += [
            "--channel",
            str(fds[0]),
            "--listen",
            str(fds[1]),
            "--memory",
            str(fds[2]),
            "--lifeline",
            str(fds[3]),
        ]
        argv += ["--my-fd", str(my_fd), "--wake-fds", ",".join(map(str, write_ends))]
        with self._open_log() as log:
            worker.process = await asyncio.create_subprocess_exec(
                *argv,
                pass_fds=fds,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._run_dir / "metrics")},
                start_new_session=True,  # Ctrl-C is for the supervisor, which then drains the workers
            )
        theirs.close()
        reader, worker.writer = await asyncio.open_connection(sock=ours, limit=channel.LIMIT)
        worker.send(
            channel.Hello(
                worker=worker.index,
                started=self._started,
                settings=self._settings,
                master=self._admin.master.hex(),
                version=self._keys_version,
                keys=self._keys,
                engines=self._engine_states(),
            )
        )
        worker.acknowledged = self._keys_version
        if self._stopping.is_set():  # it was not there yet when the others were told
            worker.send(channel.Drain())
        async for message in channel.messages(reader):
            if isinstance(message, channel.Started):
                worker.started.set()
                # What changed between Hello and now.
                worker.send(channel.Engines(self._engine_states()))
                worker.send(channel.Intake(self._intake.state))
                if worker.acknowledged != self._keys_version:
                    worker.send(channel.Keys(self._keys_version, self._keys))
                self._check_ready()
            elif isinstance(message, channel.Acknowledged):
                async with self._keys_changed:
                    worker.acknowledged = message.version
                    self._keys_changed.notify_all()
            elif isinstance(message, channel.Doubt):
                self._replica(message.pool, message.replica).doubt(message.hung)
            elif isinstance(message, channel.Begin):
                found = msgspec.to_builtins(self._answers.begin(message.place, worker.index))
                worker.send(channel.Answer(message.id, result=found))
            elif isinstance(message, channel.End):
                self._answers.end(message.place, message.answer)
            elif isinstance(message, channel.Ask):
                # Beside: a change of keys waits for this very worker's acknowledgement.
                task = asyncio.create_task(self._answer(worker.writer, message))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
        worker.started.clear()
        self._answers.left(worker.index)
        worker.writer.close()
        worker.writer = None
        await worker.process.wait()
        async with self._keys_changed:
            self._keys_changed.notify_all()

    async def _answer(self, writer: asyncio.StreamWriter, ask: channel.Ask) -> None:
        """Do what a worker asks for. `writer` leads to that very process, not to one that replaces it."""
        try:
            result = await self._operations.perform(ask.op, ask.params, ask.actor)
            answer = channel.Answer(ask.id, result=result)
        except SetupError as error:
            answer = channel.answer_to(ask, error)
        except Exception:
            logger.exception("operation %s failed", ask.op)
            answer = channel.Answer(ask.id, error="Internal error; it is in the log.")
        writer.write(channel.encode(answer))

    async def _drain(self, keepers: list[asyncio.Task[None]]) -> None:
        for listener in self._listeners:
            listener.close()
        for worker in self._workers:
            worker.send(channel.Drain())
        patience = self._settings.server.drain_timeout + 5.0
        _, late = await asyncio.wait(keepers, timeout=patience)
        for worker in self._workers:
            if worker.process is not None and worker.process.returncode is None:
                worker.process.kill()
        if late:
            await asyncio.wait(late)

    # The control socket

    async def _start_control(self) -> asyncio.AbstractServer:
        path = control.control_socket_path(self._settings.data_dir)
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve_control, path=str(path), limit=control.MAX_LINE)
        path.chmod(0o600)
        return server

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        actor = Actor("user", str(_peer_uid(writer.get_extra_info("socket"))))
        try:
            while line := await reader.readline():
                try:
                    op, params = control.decode_request(line)
                    reply = control.encode_result(await self._operations.perform(op, params, actor))
                except SetupError as error:
                    reply = control.encode_error(error)
                writer.write(reply)
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # the command went away, or sent a line over the limit
        finally:
            writer.close()

    async def _publish_keys(self) -> None:
        """Give the key table to all live workers and wait until they use it."""
        # One at a time: a list that was read earlier must never follow one that was read later.
        async with self._publishing:
            before = {key.slot: key.id for key in self._keys}
            self._keys = await asyncio.to_thread(self._admin.store.list)
            now = {key.slot: key.id for key in self._keys}
            for slot in (slot for slot, id in before.items() if now.get(slot) != id):
                self._limiter.reset(slot)
            self._keys_version += 1
            version = self._keys_version
            for worker in self._workers:
                worker.send(channel.Keys(version, self._keys))

        def all_know() -> bool:
            return all(w.acknowledged >= version for w in self._workers if w.started.is_set())

        async with self._keys_changed:
            try:
                await asyncio.wait_for(self._keys_changed.wait_for(all_know), ACK_TIMEOUT)
            except asyncio.TimeoutError:
                raise SetupError("The change is stored, but a worker has not confirmed it yet.") from None


def _peer_uid(connection: socket.socket) -> int:
    """Who is at the other end of a Unix socket; where the system does not say, the only one who may be."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.getuid()
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def lock_data_dir(data_dir: Path) -> int:
    """Hold the data directory for this service. Raises SetupError if another one has it."""
    fd = os.open(data_dir / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise SetupError(
            f"Another service is already running on the data directory {data_dir}; stop it or use --data-dir."
        ) from None
    return fd
