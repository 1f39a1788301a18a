"""The replicas that the supervisor keeps: managed engine processes, and upstreams that it watches."""

from __future__ import annotations

import asyncio
import logging
import shlex
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec

from deepseek_api_compat.config import EngineSettings, Settings
from deepseek_api_compat.engines import hf_files, kinds
from deepseek_api_compat.engines.base import Endpoint, EngineState, ModelInfo, TokenEngine
from deepseek_api_compat.engines.kv_events import KVSource
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.process import ManagedProcess
from deepseek_api_compat.engines.readiness import ready
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.errors import ApiError, ModelError, SetupError, WrongValue
from deepseek_api_compat.models import checkpoint, gguf
from deepseek_api_compat.protocol.deepseek.detect import unmet

PROBE_INTERVAL = 5.0  # seconds between two looks at a replica that is ready
PROBE_TIMEOUT = 10.0  # seconds in which it should answer the simplest question
FIRST_TOKEN = 60.0  # seconds of silence that a running engine may answer our first questions with
MISSED = 3  # such questions in a row without an answer: it hangs
UNLIMITED = 1 << 30
Question = Callable[[TokenEngine], Awaitable[ModelInfo]]
logger = logging.getLogger("deepseek_api")


class Replica(ABC):
    """One replica of a model. `number` counts over all engines of the model; `slots` while ready."""

    def __init__(
        self, pool: int, model: str, number: int, kind: str, on_change: Callable[[Replica], None]
    ) -> None:
        self.pool = pool
        self.model = model
        self.number = number
        self.kind = kind
        self.state = "starting"
        self.detail = ""
        self.slots = 0
        self.pid: int | None = None
        self.info: ModelInfo | None = None
        self.endpoint = Endpoint()
        self.kv: KVSource | None = None
        self._on_change = on_change
        self._held = False  # out of service, by an operator's wish
        self._examination: asyncio.Future[None] | None = None

    def describe(self) -> EngineState:
        return EngineState(
            self.model,
            self.number,
            self.kind,
            self.state,
            self.endpoint,
            self.pid,
            self.detail,
            self.info,
            kv=self.kv,
        )

    @abstractmethod
    async def start(self) -> None:
        """Begin; returns before the replica is ready."""

    @abstractmethod
    async def stop(self) -> None:
        """End; nothing of the replica is left afterwards."""

    def drain(self) -> None:
        """Give it no new work; answers that it is making go on at other replicas, or to their end."""
        self._held = True
        self._set("drained", "An operator took it out of service.")

    @abstractmethod
    async def check(self, path: Path) -> None:
        """Raises SetupError for a model that `restart` could not serve."""

    @abstractmethod
    async def restart(self, path: Path | None = None) -> None:
        """Back into service, from a new start where it is ours, with the model at `path` if that is given.

        Returns when it is ready. Raises SetupError if it isn't any more; it runs with its old model then, if
        that can be.
        """

    def doubt(self, hung: bool) -> None:
        """A worker lost a request to it, which died, or hangs (`hung`), or only a connection broke.

        Nobody gives it work until the next word about it. That comes in any case: at once where something is
        known already, else when it was looked at.
        """
        if self.state == "ready":
            self._set("doubtful", "It hangs." if hung else "It failed a request.")
            self._examination = asyncio.ensure_future(self._examine(hung))
        else:
            self._on_change(self)

    @abstractmethod
    async def _examine(self, hung: bool) -> None:
        """Find out whether it works, and leave the state "doubtful"."""

    def _set(self, state: str, detail: str) -> None:
        if self._held and state in ("ready", "doubtful"):
            return
        if (state, detail) != (self.state, self.detail):
            self.state, self.detail = state, detail
            self._on_change(self)


class WatchedUpstream(Replica):
    """A server that is not ours: asked every few seconds whether it answers."""

    def __init__(
        self,
        pool: int,
        model: str,
        number: int,
        settings: EngineSettings,
        on_change: Callable[[Replica], None],
    ) -> None:
        super().__init__(pool, model, number, settings.kind, on_change)
        self.endpoint = kinds.endpoint_of(settings)
        self.slots = settings.concurrency or UNLIMITED
        self._client = Upstream(self.endpoint, connect_timeout=settings.connect_timeout, read_timeout=10.0)
        self._task: asyncio.Task[None] | None = None
        self.probed = False

    async def start(self) -> None:
        await self._probe()
        self.probed = True
        self._on_change(self)
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()

    async def check(self, path: Path) -> None:
        raise WrongValue(f"{self.model} is served by {self._client.where}, which is not ours.", "path")

    async def restart(self, path: Path | None = None) -> None:
        self._held = False
        await self._probe()
        if self.state != "ready":
            raise SetupError(self.detail)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL if self.state == "ready" else 1.0)
            await self._probe()

    async def _examine(self, hung: bool) -> None:
        await self._probe()

    async def _probe(self) -> None:
        """Ready means: it answers HTTP and accepts our key. A 404 is an upstream without /models."""
        try:
            status, _ = await self._client.fetch("GET", "/models")
        except ApiError as error:
            self._set("starting", f"{self._client.where}: {error.message}")
            return
        if status in (401, 403):
            self._set("starting", f"The upstream refuses the configured key (HTTP {status}).")
        elif status >= 500:
            self._set("starting", f"The upstream answers HTTP {status}.")
        else:
            self._set("ready", "")


class AttachedEngine(WatchedUpstream):
    """A token engine that is not ours: examined until it gives real tokens, then asked as the others are."""

    def __init__(
        self,
        pool: int,
        model: str,
        number: int,
        settings: EngineSettings,
        format: str,
        on_change: Callable[[Replica], None],
        kv: KVSource | None = None,
    ) -> None:
        super().__init__(pool, model, number, settings, on_change)
        self.kv = kv
        self._settings = settings
        self._format = format

    async def _examine(self, hung: bool) -> None:
        problem = await _ask(self, self._settings, ready, self._settings.stall_timeout)
        if self.state == "doubtful":
            self._set(*(("starting", problem) if problem else ("ready", "")))

    async def _probe(self) -> None:
        if self.state == "ready":
            if problem := await _ask(self, self._settings, asked_what_it_is, PROBE_TIMEOUT):
                self._set("starting", f"{self._client.where}: {problem}")
            return
        try:
            # Not for as long as an answer may take: the service waits for this when it starts.
            self.info = await kinds.examine(self._settings, self.endpoint, self._settings.path, FIRST_TOKEN)
        except ApiError as error:
            self._set("starting", f"{self._client.where}: {error.message}")
            return
        self.slots = self._settings.concurrency or self.info.slots
        format = self.info.format if self._format == "auto" else self._format
        if problem := unmet(format, self.info.controls):
            self._set("starting", problem)
        else:
            self._set("ready", "")


class ManagedEngine(Replica):
    """An engine process that the supervisor starts, watches and restarts. `format`: as configured."""

    def __init__(
        self,
        pool: int,
        model: str,
        number: int,
        settings: EngineSettings,
        format: str,
        data_dir: Path,
        lifeline: Lifeline,
        on_change: Callable[[Replica], None],
        kv: KVSource | None = None,
    ) -> None:
        super().__init__(pool, model, number, settings.kind, on_change)
        self.kv = kv
        self._path = settings.path or ""
        self._format = format
        self.endpoint = kinds.listening_place(settings, _socket(data_dir, pool, number))
        self.slots = settings.batch_size
        self._new_process = partial(
            kinds.managed,
            settings,
            endpoint=self.endpoint,
            log=data_dir / "logs" / f"engine-{pool}-{number}.log",
            lifeline=lifeline,
            on_change=self._follow,
            kv=kv,
        )
        self._process = self._new_process(model=self._path)
        self._memory = 0
        self._settings = settings
        self._watch: asyncio.Future[None] | None = None

    def describe(self) -> EngineState:
        return msgspec.structs.replace(
            super().describe(),
            argv=kinds.shown(self._process.argv),
            memory=self._memory if self.pid else 0,
            started=self._process.started if self.pid else 0.0,
        )

    async def start(self) -> None:
        if problem := await asyncio.to_thread(self._problem):
            self._set("failed", problem)
        else:
            self._begin()
            self._watch = asyncio.ensure_future(self._keep_asking())

    async def stop(self) -> None:
        for task in (self._watch, self._examination):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._process.stop()

    async def check(self, path: Path) -> None:
        await asyncio.to_thread(self._check_model, path)

    def _begin(self) -> None:
        logger.info("%s %d: %s", self.model, self.number, shlex.join(kinds.shown(self._process.argv)))
        self._process.start()

    async def restart(self, path: Path | None = None) -> None:
        before = Path(self._path)
        self._held = False
        try:
            await self._start_anew(path or before)
        except SetupError as error:
            if path is None or path == before:
                raise
            await self._start_anew(before)
            raise SetupError(f"{path} can't be served, the model before it still is. {error}") from None

    async def _start_anew(self, path: Path) -> None:
        await self._process.stop()
        self._path = str(path)
        if problem := await asyncio.to_thread(self._problem):
            self._set("failed", problem)
            raise SetupError(problem)
        self._process = self._new_process(model=self._path)
        self._begin()
        if await self._process.until("ready", "failed") != "ready":
            raise SetupError(self._process.detail)

    def _check_model(self, path: Path) -> None:
        # Answers that have begun, and requests that wait, are ids of these tokens.
        if self.kind == "llamacpp":
            gguf.inspect(path)
            same = gguf.tokens_digest(path) == gguf.tokens_digest(Path(self._path))
        else:
            checkpoint.read(path)
            same = hf_files.same_tokenizer(path, Path(self._path))
        if not same:
            problem = f"The tokens of {path} are not those of the model that {self.model} serves now"
            raise WrongValue(f"{problem}: serve it under a name of its own.", "path")

    async def _examine(self, hung: bool) -> None:
        """Kill it if it gives no answer: to the simplest question, or if it hung, to a prompt.

        A death of its own leaves the state "doubtful" too.
        """
        pid = self._process.pid
        patience = self._settings.stall_timeout if hung else PROBE_TIMEOUT
        problem = await self._ask(ready if hung else asked_what_it_is, patience)
        if self.state == "doubtful" and self._process.pid == pid:
            if problem:
                self._process.kill()
            else:
                self._set("ready", "")

    async def _keep_asking(self) -> None:
        """An engine that hangs while nobody needs it is found, too."""
        missed = 0
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            self._memory = await asyncio.to_thread(self._process.memory)
            problem = self.state == "ready" and await self._ask(asked_what_it_is, PROBE_TIMEOUT)
            missed = missed + 1 if problem else 0
            if missed >= MISSED:
                missed = 0
                self.doubt(False)

    async def _ask(self, question: Question, patience: float) -> str:
        return await _ask(self, self._settings, question, patience)

    def _problem(self) -> str:
        """Why this model's prompts can't be written, which no new start would change; "" if they can."""
        folder = Path(self._path) if self.kind == "llamacpp" else hf_files.folder_of(self._path)
        if folder is None:  # the engine will fetch it, or say that there is no such model
            return ""
        try:
            files = checkpoint.read(folder)
        except ModelError as error:
            return str(error)
        return unmet(files.format if self._format == "auto" else self._format, files.controls)

    def _follow(self, process: ManagedProcess) -> None:
        self.pid = process.pid
        self.info = process.info or self.info
        self._set("starting" if process.state == "backoff" else process.state, process.detail)


async def asked_what_it_is(engine: TokenEngine) -> ModelInfo:
    """The simplest question."""
    return await engine.info()


async def _ask(replica: Replica, settings: EngineSettings, question: Question, patience: float) -> str:
    """Why a token engine gave no answer within `patience` seconds; "" if it did."""
    engine = kinds.connect(settings, replica.endpoint, replica.info, patience)
    try:
        await asyncio.wait_for(question(engine), patience)
        return ""
    except asyncio.TimeoutError:
        return f"It gave no answer within {patience:g} s."
    except ApiError as error:
        return error.message
    finally:
        await engine.close()


def replicas_of(
    settings: Settings, lifeline: Lifeline, on_change: Callable[[Replica], None]
) -> list[Replica]:
    """Every replica of every model, numbered within its model. Raises ConfigError."""
    replicas: list[Replica] = []
    for pool, model in enumerate(settings.models):
        number = 0
        for engine in model.engines:
            for _ in range(engine.replicas):
                where = (pool, model.name, number, engine)
                kv = kinds.kv_source(model, engine, _socket(settings.data_dir, pool, number))
                if engine.kind == "openai":
                    replicas.append(WatchedUpstream(*where, on_change))
                elif engine.managed:
                    managed = ManagedEngine(*where, model.format, settings.data_dir, lifeline, on_change, kv)
                    replicas.append(managed)
                else:
                    replicas.append(AttachedEngine(*where, model.format, on_change, kv))
                number += 1
    return replicas


def _socket(data_dir: Path, pool: int, number: int) -> Path:
    return data_dir / "run" / "engines" / f"{pool}-{number}.sock"
