"""`deepseek-api serve`: prepare the model, bind the port, start the supervisor, say how to call it."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shlex
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from deepseek_api_compat import __version__
from deepseek_api_compat.errors import SetupError

if TYPE_CHECKING:
    from deepseek_api_compat.config import EngineSettings, Settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="start the service",
        description="Start the service. Without a model it fetches and serves a small embedded one.",
    )
    add_arguments(parser, host=None)


def add_arguments(parser: argparse.ArgumentParser, *, host: str | None) -> None:
    """`host`: the default address, None to leave it to the configuration."""
    add = parser.add_argument
    add(
        "--model-path",
        metavar="PATH",
        help="a GGUF file, a directory with one, or a name from 'deepseek-api models list'",
    )
    add(
        "--engine",
        metavar="KIND=URL",
        action="append",
        help="serve what a running server serves: vllm=, sglang=, llamacpp= or openai=http://HOST:PORT; "
        "several are replicas of one model",
    )
    add(
        "--llama-server",
        metavar="PATH",
        help="start llama.cpp by this llama-server program, not by the embedded one",
    )
    add("--plan", metavar="FILE", type=Path, help="launch what 'deepseek-api plan --json' has written")
    add(
        "--node-rank",
        type=int,
        metavar="N",
        default=0,
        help="with --plan: which of its nodes this is; beyond 0 only the engine's own worker runs here",
    )
    add("--host", default=host, help="address to listen on; 0.0.0.0 opens the service to the network")
    add("--port", type=int, help="port to listen on (default 8000)")
    add("--workers", type=int, metavar="N", help="gateway processes (default 1)")
    add("--config", metavar="FILE", help="a TOML file; see config.example.toml")
    add("--data-dir", metavar="DIR", help="keys, logs and state (default ~/.local/share/deepseek-api)")
    add("--public-url", metavar="URL", help="the address to show, where it differs from host and port")
    add("--tls-cert", metavar="FILE", help="certificate chain; then only TLS 1.3 is spoken")
    add("--tls-key", metavar="FILE", help="private key of the certificate")
    add(
        "--tls-dev",
        action="store_true",
        default=None,
        help="make a self-signed certificate, for development, and say how to trust it",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from deepseek_api_compat import config
    from deepseek_api_compat.gateway import supervisor
    from deepseek_api_compat.gateway.listen import bind
    from deepseek_api_compat.security.admin import open_admin
    from deepseek_api_compat.store.datadir import make_data_dir

    if args.node_rank:
        become_worker(args.plan, args.node_rank)
    names = ("host", "port", "workers", "data_dir", "public_url", "tls_cert", "tls_key", "tls_dev")
    settings = config.load(args.config, flags={"server": {name: getattr(args, name) for name in names}})
    config.check_files(settings)
    check_formats(settings)
    check_network(settings)
    check_plugins(settings)
    check_media(settings)
    settings = config.with_multimodal(with_plan(settings, args))
    allow_many_connections()
    # The port first: a model may take minutes to fetch, and a taken port should be said at once.
    listeners = bind(settings.server.host, settings.server.port, settings.server.workers)
    make_data_dir(settings.data_dir)
    lock = supervisor.lock_data_dir(settings.data_dir)
    settings = with_certificate(settings)
    settings = with_engines(settings, args.engine or [], args.model_path)
    check_embedded(settings, args.model_path, args.llama_server)
    settings = with_llama_server(with_models(settings, args.model_path), args.llama_server)
    admin = open_admin(settings.data_dir)
    address = listeners[0].getsockname()[:2]

    async def serve() -> None:
        def ready(key: str | None, problems: list[str]) -> None:
            announce(settings, address, key, problems)

        await supervisor.Supervisor(settings, listeners, admin, ready).run()

    try:
        asyncio.run(serve())
    finally:
        admin.close()
        for listener in listeners:
            listener.close()
        os.close(lock)
    return 0


def become_worker(file: Path | None, rank: int) -> NoReturn:
    """Replace this process by the engine's worker of that node. Raises ConfigError, SetupError."""
    from deepseek_api_compat.errors import ConfigError
    from deepseek_api_compat.models.launch import node_command, read_launch

    if file is None:
        raise ConfigError("--node-rank needs a --plan.")
    argv = node_command(read_launch(file), rank)
    print(f"Node {rank} of the plan runs: {shlex.join(argv)}", flush=True)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the engine's own command, as the plan shows it
    except OSError as error:
        raise SetupError(f"Can't run {argv[0]}: {error.strerror}.") from None


def with_plan(settings: Settings, args: argparse.Namespace) -> Settings:
    """Settings with the models of `--plan`, if it is given. Raises ConfigError."""
    import msgspec

    from deepseek_api_compat.errors import ConfigError
    from deepseek_api_compat.models.launch import node_command, read_launch

    if args.plan is None:
        return settings
    if settings.models or args.model_path is not None or args.engine:
        raise ConfigError("Give either --plan, --engine, --model-path or [[models]] in the configuration.")
    found = read_launch(args.plan)
    node_command(found, 0)
    return msgspec.structs.replace(settings, models=found.models)


def allow_many_connections() -> None:
    """A stream takes two file descriptors, and the usual soft limit is 1024: raise it as far as we may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_formats(settings: Settings) -> None:
    """Raises ConfigError if a configured format needs a package that is not installed."""
    from deepseek_api_compat.errors import ConfigError
    from deepseek_api_compat.protocol.deepseek.detect import unmet_package

    for model in settings.models:
        if problem := unmet_package(model.format):
            raise ConfigError(f"Configuration: models.{model.name}: {problem}")


def check_media(settings: Settings) -> None:
    """Raises ConfigError for a key's variable that is not set."""
    from deepseek_api_compat.config import secret_from_env

    for variable in (settings.media.caption_api_key_env, settings.media.transcription_api_key_env):
        if variable is not None:
            secret_from_env(variable)


def check_plugins(settings: Settings) -> None:
    """Raises ConfigError for a plugin that can't be built."""
    if settings.plugins:
        from deepseek_api_compat.gateway import plugins

        plugins.check(settings.plugins)


def check_network(settings: Settings) -> None:
    """Raises ConfigError if a configured network is none."""
    from deepseek_api_compat.errors import ConfigError
    from deepseek_api_compat.security.scope import networks

    for name in ("allow", "trusted_proxies"):
        try:
            networks(getattr(settings.network, name))
        except ValueError as error:
            raise ConfigError(f"Configuration: network.{name}: {error}") from None


def with_certificate(settings: Settings) -> Settings:
    """Settings whose certificate, if they have one, can be used. Raises SetupError."""
    import msgspec

    from deepseek_api_compat.security import certificates

    server = settings.server
    if server.tls_dev:
        place = certificates.development_place(settings.data_dir)
        cert, key = certificates.development_certificate(place, certificates.development_names(server))
        server = msgspec.structs.replace(server, tls_cert=str(cert), tls_key=str(key))
    if server.tls_cert is not None:
        certificates.tls_context(server.tls_cert, server.tls_key)
    return msgspec.structs.replace(settings, server=server)


def with_engines(settings: Settings, attached: list[str], model_path: str | None) -> Settings:
    """Settings with one model: that of the running servers given as KIND=URL. Raises ConfigError, SetupError.

    It has the name that the first of them gives it.
    """
    import msgspec

    from deepseek_api_compat.config import STAND_IN_ALIASES, EngineSettings, ModelSettings
    from deepseek_api_compat.errors import ConfigError

    if not attached:
        return settings
    if settings.models or model_path is not None:
        raise ConfigError("Give either --engine, --model-path or [[models]] in the configuration.")
    engines = []
    for one in attached:
        kind, _, url = one.partition("=")
        if kind == "openai" and not urlsplit(url).path.strip("/"):
            url = f"{url.rstrip('/')}/v1"
        try:
            engines.append(msgspec.convert({"kind": kind, "base_url": url}, EngineSettings))
        except msgspec.ValidationError:
            kinds = "vllm, sglang, llamacpp or openai"
            raise ConfigError(f"--engine {one}: give KIND=URL, with KIND one of {kinds}.") from None
    if len({engine.kind for engine in engines}) > 1:
        raise ConfigError("--engine: servers of two kinds can't stand behind one name.")
    theirs = model_name(engines[0])
    engines = [msgspec.structs.replace(engine, model=theirs) for engine in engines]
    name = Path(theirs).name if theirs.startswith("/") else theirs
    aliases = [alias for alias in STAND_IN_ALIASES if alias != name]
    return msgspec.structs.replace(
        settings, models=[ModelSettings(name=name, aliases=aliases, engines=engines)]
    )


def model_name(engine: EngineSettings) -> str:
    """What a running server calls its first model. Raises ConfigError, SetupError."""
    from deepseek_api_compat.engines.kinds import endpoint_of, first_model
    from deepseek_api_compat.errors import ApiError

    try:
        return asyncio.run(first_model(engine, endpoint_of(engine)))
    except ApiError as error:
        raise SetupError(f"--engine {engine.kind}={engine.base_url}: {error.message}") from None


def with_llama_server(settings: Settings, program: str | None) -> Settings:
    """Settings whose llama.cpp engines are started by `program`. Raises SetupError if it is none."""
    import msgspec

    if program is None:
        return settings
    found = which(program)
    if found is None:
        raise SetupError(f"--llama-server {program}: there is no such program, or it can't be run.")
    models = []
    for model in settings.models:
        engines = [
            msgspec.structs.replace(engine, command=[found])
            if engine.kind == "llamacpp" and engine.managed
            else engine
            for engine in model.engines
        ]
        models.append(msgspec.structs.replace(model, engines=engines))
    return msgspec.structs.replace(settings, models=models)


def check_embedded(settings: Settings, model_path: str | None, llama_server: str | None) -> None:
    """Raises SetupError if these settings need the embedded engine and it is not installed."""
    engines = [engine for model in settings.models for engine in model.engines]
    embedded = any(one.kind == "llamacpp" and one.managed and not one.command for one in engines)
    needed = (model_path or not engines or embedded) and llama_server is None
    if needed and find_spec("xllamacpp") is None:
        raise SetupError(
            "The embedded engine is not installed: pip install 'deepseek-api-compat[embedded]', "
            "or configure an engine of kind openai."
        )


def with_models(settings: Settings, model_path: str | None) -> Settings:
    """Settings whose models are all files that exist. Raises ModelError, ConfigError."""
    import msgspec

    from deepseek_api_compat.config import DEFAULT_MODEL, STAND_IN_ALIASES, EngineSettings, ModelSettings
    from deepseek_api_compat.errors import ConfigError
    from deepseek_api_compat.models import prepared

    if model_path is not None:
        if settings.models:
            raise ConfigError("Give either --model-path or [[models]] in the configuration, not both.")
        path = prepared.resolve(model_path)
        taken = path.stem.lower()
        aliases = [alias for alias in STAND_IN_ALIASES if alias != taken]
        engine = EngineSettings(kind="llamacpp", path=str(path))
        return msgspec.structs.replace(
            settings, models=[ModelSettings(name=taken, aliases=aliases, engines=[engine])]
        )
    if not settings.models:
        engine = EngineSettings(kind="llamacpp", path=str(prepared.default_model()))
        # Its authors' sampling: at OpenAI's default of 1.0 a model this small writes nonsense.
        model = ModelSettings(
            name=DEFAULT_MODEL, aliases=list(STAND_IN_ALIASES), temperature=0.2, top_p=0.9, engines=[engine]
        )
        return msgspec.structs.replace(settings, models=[model])
    models = []
    for model in settings.models:
        engines = [
            msgspec.structs.replace(engine, path=str(prepared.resolve(engine.path)))
            if engine.kind == "llamacpp" and engine.managed and engine.path
            else engine
            for engine in model.engines
        ]
        models.append(msgspec.structs.replace(model, engines=engines))
    return msgspec.structs.replace(settings, models=models)


def announce(settings: Settings, address: tuple[str, int], key: str | None, problems: list[str]) -> None:
    """What a newcomer needs to make the first call."""
    from deepseek_api_compat.config import DEFAULT_MODEL
    from deepseek_api_compat.security.certificates import fingerprint, own_address

    host, port = address
    scheme = "https" if settings.server.tls_cert else "http"
    opened = host in ("0.0.0.0", "::")  # noqa: S104
    local = f"{scheme}://{bracket('127.0.0.1' if opened else host)}:{port}"
    public = settings.server.public_url or (f"{scheme}://{bracket(own_address())}:{port}" if opened else None)
    lines = [f"DeepSeek API {__version__} is ready.", ""]
    for model in settings.models:
        also = f"  (also answers to {', '.join(model.aliases)})" if model.aliases else ""
        lines.append(f"  model     {model.name}{also}")
        if model.name == DEFAULT_MODEL:
            lines.append(
                "            a small English model that stands in until you give a DeepSeek one: --model-path"
            )
    lines.append(f"  local     {local}/v1")
    lines.append(f"  network   {public + '/v1' if public else 'not opened; --host 0.0.0.0 opens it'}")
    if settings.server.tls_dev and (cert := settings.server.tls_cert):
        lines.append(f"  TLS       for development: {cert}")
        lines.append(f"            SHA-256 {fingerprint(Path(cert).read_bytes())}")
        lines.append("            signed by itself: clients must be told to trust this file")
    if key:
        lines.append(f"  API key   {key}")
        lines.append(
            "            shown this once; only its hash is kept. More: deepseek-api keys create NAME"
        )
    else:
        lines.append("  API key   as before; a new one: deepseek-api keys create NAME")
    lines += [f"  problem   {problem}" for problem in problems]
    lines += [
        "",
        "Try it:",
        "",
        curl(
            f"{public or local}",
            key or "$DEEPSEEK_API_KEY",
            settings.models[0].name,
            settings.server.tls_cert if settings.server.tls_dev else None,
        ),
        "",
    ]
    print("\n".join(lines), flush=True)


def curl(url: str, key: str, model: str, trust: str | None = None) -> str:
    question = '[{"role": "user", "content": "What is the capital of France?"}]'
    return (
        f"curl {f'--cacert {shlex.quote(trust)} ' if trust else ''}{url}/v1/chat/completions \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f'  -H "Authorization: Bearer {key}" \\\n'
        f'  -d \'{{"model": "{model}", "messages": {question}}}\''
    )


def bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
