"""The kinds of token engine: how each is called, how it is started, and how it is seen to be ready.

Everything that differs from kind to kind, beyond the clients themselves, is here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket as sockets
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from deepseek_api_compat.config import EngineSettings, ModelSettings, child_environment, secret_from_env
from deepseek_api_compat.engines import guard, hf_files, llamacpp
from deepseek_api_compat.engines.base import Endpoint, EngineState, ModelInfo, TokenEngine
from deepseek_api_compat.engines.kv_events import KVSource
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.llamacpp import LlamaCpp
from deepseek_api_compat.engines.process import ManagedProcess, Unfit
from deepseek_api_compat.engines.readiness import check_record, keeps_to_grammars, ready
from deepseek_api_compat.engines.sglang import SgLang
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.engines.vllm import Vllm
from deepseek_api_compat.engines.vllm_wire import Models, decode, refusal
from deepseek_api_compat.errors import ConfigError, EngineFailed

SOCKET_PATH_MAX = 103  # bytes; Linux takes 107, macOS and BSD 103
READY_TIMEOUT = 1800.0  # seconds for loading; hundreds of GB from a disk take minutes, a compilation more
VLLM = ("-m", "vllm.entrypoints.openai.api_server")
SGLANG = ("-m", "sglang.launch_server")
# vLLM reports what it runs to its authors unless told not to.
ENVIRONMENT = {"vllm": {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}}
SECRETS = ("key", "token", "password", "secret")
# Options of an engine that has several caches, one beside the GPU's or none, or whose events go elsewhere.
TELLS_LITTLE = frozenset(
    {
        *("--kv-events-config", "--no-enable-prefix-caching", "--disable-radix-cache"),
        *("--data-parallel-size", "-dp", "--dp-size", "--dp", "--data-parallel-size-local"),
        *("--kv-transfer-config", "--kv-offloading-size", "--enable-hierarchical-cache"),
    }
)


def client(settings: EngineSettings, state: EngineState) -> TokenEngine:
    """The client of a replica, with what is known of its model."""
    return connect(settings, state.endpoint, state.info)


def connect(
    settings: EngineSettings, endpoint: Endpoint, known: ModelInfo | None, patience: float | None = None
) -> TokenEngine:
    """A client; `patience`: seconds of silence that it bears, if not those of the settings."""
    connect_timeout, stall_timeout = settings.connect_timeout, settings.stall_timeout
    read_timeout = patience or settings.read_timeout
    if settings.kind == "llamacpp":
        return LlamaCpp(
            endpoint,
            known=known,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            stall_timeout=stall_timeout,
        )
    slots = settings.concurrency or settings.batch_size
    if settings.kind == "vllm":
        return Vllm(
            endpoint,
            slots=slots,
            model=settings.model,
            known=known,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            stall_timeout=stall_timeout,
        )
    return SgLang(
        endpoint,
        slots=slots,
        known=known,
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        stall_timeout=stall_timeout,
    )


def endpoint_of(settings: EngineSettings) -> Endpoint:
    """Where a server that is not ours listens. Raises ConfigError for a URL that is none, or an unset key.

    Token engines have routes beside /v1, so a /v1 at the end of theirs is left out.
    """
    try:
        url = urlsplit(settings.base_url or "")
        port = url.port
    except ValueError:  # a port or an address in brackets that is none
        url, port = urlsplit(""), None
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"Configuration: base_url {settings.base_url!r} is not an http or https address.")
    headers = {}
    if settings.api_key_env:
        headers["authorization"] = f"Bearer {secret_from_env(settings.api_key_env)}"
    tls = url.scheme == "https"
    base = url.path.rstrip("/")
    return Endpoint(
        host=url.hostname,
        port=port or (443 if tls else 80),
        tls=tls,
        base=base if settings.kind == "openai" else base.removesuffix("/v1"),
        headers=headers,
    )


def listening_place(settings: EngineSettings, socket: Path) -> Endpoint:
    """Where a managed engine will listen: on `socket`, or if it knows only ports, on a free one.

    The socket's directory is made, for this user only. Raises ConfigError if its path is too long.
    """
    if settings.kind == "sglang":
        with sockets.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return Endpoint(port=probe.getsockname()[1])
    if len(str(socket).encode()) > SOCKET_PATH_MAX:
        raise ConfigError(f"The path {socket} is too long for a socket: choose a shorter data directory.")
    _private(socket.parent)
    return Endpoint(uds=str(socket))


def _private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def kv_source(model: ModelSettings, engine: EngineSettings, socket: Path) -> KVSource | None:
    """Where a replica tells of its KV cache, a managed one on sockets beside `socket`; None: nowhere.

    Raises ConfigError for a configured endpoint that can't be read.
    """
    several = sum(one.replicas for one in model.engines) > 1
    wanted = several and model.routing == "prefix" and engine.kv_events != "off"
    if not wanted or engine.kind not in ("vllm", "sglang"):
        return None
    readable = importlib.util.find_spec("zmq") is not None
    if not engine.managed:
        if engine.kv_events == "auto":
            return None
        if not readable:
            problem = "kv_events needs the extra kv-events: pip install 'deepseek-api-compat[kv-events]'"
            raise ConfigError(f"Configuration: {problem}.")
        return KVSource(engine.kv_events, engine.kv_replay)
    paths = [socket.with_suffix(end) for end in (".kv", ".kvr")]
    fits = all(len(str(path).encode()) <= SOCKET_PATH_MAX for path in paths)
    if not readable or not fits or not _tells_all(engine, isolated=model.isolate_cache):
        return None
    _private(socket.parent)
    return KVSource(*(f"ipc://{path}" for path in paths))


def _tells_all(engine: EngineSettings, *, isolated: bool) -> bool:
    """Whether its events say all that there is to know, and no more than can be followed."""
    options = {part.split("=", 1)[0].replace("_", "-") for part in engine.args}
    # SGLang tells no salts, and of each page by itself: of each token, unless it is given larger pages.
    mute = engine.kind == "sglang" and (isolated or "--page-size" not in options)
    return not mute and options.isdisjoint(TELLS_LITTLE)


def managed(
    settings: EngineSettings,
    *,
    model: str,
    endpoint: Endpoint,
    log: Path,
    lifeline: Lifeline,
    on_change: Callable[[ManagedProcess], None] | None = None,
    kv: KVSource | None = None,
) -> ManagedProcess:
    """The process that serves `model` (a path, or a repository's name) at `endpoint`; not started yet.

    kv: where it shall tell of its KV cache.
    """
    argv = _program(settings, model, endpoint, kv)
    if settings.kind == "llamacpp" and not settings.command:
        assert endpoint.uds is not None
        argv = llamacpp.embedded(settings, Path(model), Path(endpoint.uds), lifeline.fd)
    else:
        argv = guard.command(argv, lifeline.fd, endpoint.uds)
    return ManagedProcess(
        argv,
        log=log,
        ready=lambda: examine(settings, endpoint, model),
        env=child_environment(**{**ENVIRONMENT.get(settings.kind, {}), **settings.env}),
        pass_fds=(lifeline.fd,),
        start_timeout=READY_TIMEOUT,
        on_change=on_change,
    )


def _program(settings: EngineSettings, model: str, endpoint: Endpoint, kv: KVSource | None) -> list[str]:
    """The command line of the engine itself."""
    if settings.kind == "llamacpp":
        return llamacpp.llama_server(settings, Path(model), Path(endpoint.uds or ""))
    options: dict[str, object]
    if settings.kind == "vllm":
        command = settings.command or [sys.executable, *VLLM]
        named = [model] if command[-1] == "serve" else ["--model", model]
        options = {"--uds": endpoint.uds, "--max-num-seqs": settings.batch_size}
        options["--structured-outputs-config"] = '{"backend": "guidance"}'
        context, parallel = "--max-model-len", "--tensor-parallel-size"
        flags = ["--enable-prompt-tokens-details"]
    else:
        command = settings.command or [sys.executable, *SGLANG]
        named = ["--model-path", model]
        options = {"--host": endpoint.host, "--port": endpoint.port}
        options |= {"--max-running-requests": settings.batch_size, "--grammar-backend": "llguidance"}
        context, parallel = "--context-length", "--tp-size"
        flags = []
    if kv is not None:
        events = {"publisher": "zmq", "endpoint": kv.events, "replay_endpoint": kv.replay}
        switch = {"enable_kv_cache_events": True} if settings.kind == "vllm" else {}
        options["--kv-events-config"] = json.dumps({**switch, **events})
    if settings.context:
        options[context] = settings.context
    if settings.tensor_parallel > 1:
        options[parallel] = settings.tensor_parallel
    written = [part for option, value in options.items() for part in (option, str(value))]
    return [*command, *named, *written, *flags, *settings.args]


def shown(argv: list[str]) -> list[str]:
    """A command line without the values of options that sound like secrets."""
    parts: list[str] = []
    hide = False
    for part in argv:
        option, _, value = part.partition("=")
        secret = part.startswith("--") and any(word in option.lower().split("-") for word in SECRETS)
        parts.append("***" if hide else f"{option}=***" if secret and value else part)
        hide = secret and not value and not hide
    return parts


async def first_model(settings: EngineSettings, endpoint: Endpoint) -> str:
    """What a running server calls the first model that it lists. Raises ApiError."""
    upstream = Upstream(endpoint, connect_timeout=settings.connect_timeout, read_timeout=30.0)
    try:
        path = "/models" if settings.kind == "openai" else "/v1/models"
        status, body = await upstream.fetch("GET", path)
        if status != 200:
            raise refusal(status, body)
        models = decode(body, Models).data
    finally:
        await upstream.close()
    if not models:
        raise EngineFailed("It lists no model.")
    return models[0].id


async def examine(
    settings: EngineSettings, endpoint: Endpoint, model: str | None, patience: float | None = None
) -> ModelInfo:
    """What an engine serves, once it has given real tokens and, where they are on record, the right ones.

    model: the path or repository that it was started with; None to ask it. patience: as for `connect`. Raises
    ApiError while it can't, Unfit if it must not be used.
    """
    stranger = connect(settings, endpoint, None, patience)
    try:
        info = await ready(stranger)
        folder = await _folder(settings, stranger, model)
    finally:
        await stranger.close()
    if settings.kind == "llamacpp":
        return await asyncio.to_thread(llamacpp.with_files, info, folder) if folder else info
    if folder is None:
        raise Unfit(
            "The model's files can't be read here: `path` must name a folder with its tokenizer files."
        )
    info = await asyncio.to_thread(hf_files.with_files, info, folder)
    engine = connect(settings, endpoint, info, patience)
    try:
        await check_record(engine, folder, info.context)
        can = msgspec.structs.replace(info.can, grammar=await keeps_to_grammars(engine))
    finally:
        await engine.close()
    return msgspec.structs.replace(info, can=can)


async def _folder(settings: EngineSettings, engine: TokenEngine, model: str | None) -> Path | None:
    """Where the model's files are on this machine; None if they are not."""
    if settings.kind == "llamacpp":
        return Path(model) if model else None
    if model is None and isinstance(engine, (Vllm, SgLang)):
        model = await engine.model_source()
    return await asyncio.to_thread(hf_files.folder_of, model) if model else None
