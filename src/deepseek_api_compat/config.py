"""Settings of the service, and the only reader of the environment.

Order, later wins: defaults, the TOML file, `DEEPSEEK_<SECTION>_<KEY>` variables, command-line flags.
An unknown key is an error that names it. `docs/configuration.md` has a heading for each key.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import msgspec

from deepseek_api_compat.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
ENV_PREFIX = "DEEPSEEK_"
DEFAULT_MODEL = "smollm2-135m-instruct"
# Who asks for pictures to be read asks for V3, which reads text: the same model, see [media].
MULTIMODAL = "deepseek-v3-multimodal"
STAND_IN_ALIASES = ["deepseek-v3", "deepseek-chat", MULTIMODAL]
# As browsers write it: lower case, no path, no "*", and not "null", which every sandboxed page is.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")
# Of ZeroMQ, as far as engines publish there.
_ENDPOINT = re.compile(r"tcp://([^\s:*]+|\[[0-9a-f:]+\]):[0-9]{1,5}|ipc:///\S+")


class Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of all sections: plain data, unknown keys refused."""


class ServerSettings(Section, frozen=True):
    """`[server]`: where the service listens and how patient it is. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    data_dir: str = "~/.local/share/deepseek-api"
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_dev: bool = False
    require_tls: bool = False
    public_url: str | None = None
    max_body_bytes: int = 32 * 1024 * 1024
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 120.0
    keep_alive_timeout: float = 75.0
    first_event_timeout: float = 10.0
    keep_alive_interval: float = 10.0
    drain_timeout: float = 30.0


class LogSettings(Section, frozen=True):
    """`[log]`: what is written to `logs/gateway.log` in the data directory, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    requests: bool = False
    slow_seconds: float = 30.0
    bodies: bool = False


class NetworkSettings(Section, frozen=True):
    """`[network]`: who may connect, and from pages of which sites. Networks in CIDR form."""

    allow: list[str] = []
    trusted_proxies: list[str] = []
    cors_origins: list[str] = []


class LimitSettings(Section, frozen=True):
    """`[limits]`: what one key, and the service as a whole, may ask for. 0 of a limit: none."""

    requests_per_second: float = 100.0
    burst_seconds: float = 1.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrency: int = 0
    reserved_completion_tokens: int = 1024
    redis_url: str | None = None
    max_queue: int = 128
    queue_timeout: float = 300.0
    max_n: int = 16
    max_messages: int = 10_000


class EngineSettings(Section, frozen=True):
    """`[[models.engines]]`: one engine, or several replicas of one, behind a model name.

    llamacpp, vllm, sglang: path, replicas, batch_size (slots), context (tokens per slot), how it is started
              (command, args, env); or base_url of one that runs already.
    llamacpp: threads, gpu_layers, embedding.
    vllm, sglang: tensor_parallel; kv_events ("auto", "off", or with a base_url a ZeroMQ endpoint), kv_replay.
    openai:   base_url, model (its name there), api_key_env, concurrency (0: no cap), vision and hearing
              (it takes pictures, or sound, as they are).
    """

    kind: Literal["llamacpp", "vllm", "sglang", "openai"]
    path: str | None = None
    replicas: int = 1
    command: list[str] = []
    args: list[str] = []
    env: dict[str, str] = {}
    tensor_parallel: int = 1
    batch_size: int = 8
    context: int = 0
    threads: int = 0
    gpu_layers: int = -1
    embedding: bool = False
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    concurrency: int = 0
    connect_timeout: float = 5.0
    read_timeout: float = 600.0
    stall_timeout: float = 120.0
    prefix_continuation: bool = False
    vision: bool = False
    hearing: bool = False
    weight: float = 1.0
    kv_events: str = "auto"
    kv_replay: str | None = None

    @property
    def managed(self) -> bool:
        """Whether it is a process that the service starts."""
        return self.base_url is None


class ModelLimitSettings(Section, frozen=True):
    """`[models.limits]`: what all keys together may ask of a model. 0 of a limit: none."""

    requests_per_second: float = 0.0
    burst_seconds: float = 1.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrency: int = 0
    budget: Decimal | None = None


class ModelSettings(Section, frozen=True):
    """`[[models]]`: a name that clients use, and the engines behind it.

    `temperature` and `top_p` hold for requests that name none.
    """

    name: str
    aliases: list[str] = []
    format: Literal["auto", "template", "v3", "v3-0324", "r1", "v3.1", "v3.2", "v4", "v4.1"] = "auto"
    profile: Literal["openai", "deepseek"] = "openai"
    temperature: float = 1.0
    top_p: float = 1.0
    temperature_mapping: bool = False
    ready_timeout: float = 30.0
    isolate_cache: bool = False
    fallback: list[str] = []
    routing: Literal["prefix", "least-load", "round-robin", "consistent-hash"] = "prefix"
    slow_start: float = 30.0
    limits: ModelLimitSettings = ModelLimitSettings()
    engines: list[EngineSettings] = []


class MediaSettings(Section, frozen=True):
    """`[media]`: how pictures and sound become text, for models that read only that.

    Times in seconds, sizes in bytes.
    """

    ocr: bool = True
    speech: bool = True
    caption_url: str | None = None
    caption_model: str | None = None
    caption_api_key_env: str | None = None
    transcription_url: str | None = None
    transcription_model: str | None = None
    transcription_api_key_env: str | None = None
    timeout: float = 60.0
    fetch: bool = True
    fetch_timeout: float = 10.0
    fetch_networks: list[str] = []
    max_files: int = 16
    max_bytes: int = 10 * 1024 * 1024
    max_pixels: int = 40_000_000
    cache_bytes: int = 16 * 1024 * 1024


class LedgerSettings(Section, frozen=True):
    """`[ledger]`: where every request is written down, how durably and for how long."""

    database_url: str | None = None
    currency: str = "USD"
    fsync: Literal["never", "interval", "always"] = "interval"
    when_unavailable: Literal["serve", "refuse"] = "serve"
    max_journal_bytes: int = 1024 * 1024 * 1024
    retention_days: int = 90
    usage_retention_days: int = 730


class PriceSettings(Section, frozen=True):
    """`[[prices]]`: what a million tokens of a model cost. `cached` not set: as other prompt tokens."""

    model: str
    prompt: Decimal = Decimal(0)
    cached: Decimal | None = None
    completion: Decimal = Decimal(0)


class PluginSettings(Section, frozen=True):
    """`[[plugins]]`: a plugin, in the order of the tables. `timeout` in seconds; 0: the plugin's own.

    use: the name of an installed one, or module:Class, looked for in `path` too. models: only for these.
    """

    use: str
    path: str | None = None
    options: dict[str, Any] = {}
    on_error: Literal["refuse", "skip"] | None = None
    timeout: float = 0.0
    models: list[str] = []


class Settings(Section, frozen=True):
    """All settings. `models` is empty until a model is configured; then the default one is used."""

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    network: NetworkSettings = NetworkSettings()
    limits: LimitSettings = LimitSettings()
    models: list[ModelSettings] = []
    ledger: LedgerSettings = LedgerSettings()
    prices: list[PriceSettings] = []
    media: MediaSettings = MediaSettings()
    plugins: list[PluginSettings] = []

    @property
    def data_dir(self) -> Path:
        return Path(self.server.data_dir).expanduser().absolute()


def cache_dir() -> Path:
    """Where prepared models are kept, shared by all data directories."""
    base = os.environ.get("DEEPSEEK_CACHE_DIR")
    return Path(base).expanduser() if base else Path("~/.cache/deepseek-api").expanduser()


def huggingface_endpoint() -> str:
    """Base URL of the Hugging Face Hub, or of the mirror that `HF_ENDPOINT` names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def huggingface_token() -> str | None:
    """The access token for gated repositories (`HF_TOKEN`)."""
    return os.environ.get("HF_TOKEN") or None


def huggingface_cache() -> Path:
    """Where Hugging Face's programs keep what they fetch: `HF_HOME`, as they do."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"


def modelscope_endpoint() -> str:
    """Base URL of ModelScope: `MODELSCOPE_ENDPOINT`, or `MODELSCOPE_DOMAIN` as its own client reads it."""
    base = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return (base if "://" in base else f"https://{base}").rstrip("/")


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, for a child that has settings of its own (pip, for one)."""
    return {**os.environ, **changes}


def master_key_from_env() -> str | None:
    """`DEEPSEEK_MASTER_KEY`, which nodes that share a key database set instead of a `master.key` file."""
    return os.environ.get("DEEPSEEK_MASTER_KEY") or None


def secret_from_env(name: str) -> str:
    """The value of variable `name`; raises ConfigError if it is unset or empty."""
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(f"The environment variable {name} is not set, but the configuration names it.")
    return value


def load(
    path: str | None = None,
    *,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Merge file, environment and flags (`{"server": {"port": 8001}}`; None values are skipped)."""
    raw: dict[str, Any] = _read_file(path) if path else {}
    _merge(raw, _from_environment(os.environ if environ is None else environ))
    _merge(raw, {k: {f: v for f, v in s.items() if v is not None} for k, s in (flags or {}).items()})
    try:
        settings = msgspec.convert(raw, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Configuration{f' {path}' if path else ''}: {error}.") from None
    _check(settings)
    return settings


def with_multimodal(settings: Settings) -> Settings:
    """The model called deepseek-v3 has the alias for requests with pictures too, unless another has it."""
    names = [{model.name, *model.aliases} for model in settings.models]
    if any(MULTIMODAL in those for those in names):
        return settings
    models = [
        msgspec.structs.replace(model, aliases=[*model.aliases, MULTIMODAL])
        if "deepseek-v3" in those
        else model
        for model, those in zip(settings.models, names, strict=True)
    ]
    return msgspec.structs.replace(settings, models=models)


def _read_file(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return dict(tomllib.load(file))
    except OSError as error:
        raise ConfigError(f"Can't read the configuration {path}: {error.strerror}.") from None
    except ValueError as error:  # TOMLDecodeError, or bytes that are no UTF-8
        raise ConfigError(f"The configuration {path} is not valid TOML: {error}.") from None


_SECTIONS: dict[str, type[Section]] = {
    "server": ServerSettings,
    "log": LogSettings,
    "network": NetworkSettings,
    "limits": LimitSettings,
    "ledger": LedgerSettings,
    "media": MediaSettings,
}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        for section, struct in _SECTIONS.items():
            prefix = f"{ENV_PREFIX}{section.upper()}_"
            if not variable.startswith(prefix):
                continue
            key = variable[len(prefix) :].lower()
            if key not in struct.__struct_fields__:
                raise ConfigError(
                    f"The environment variable {variable} names no setting: [{section}] has no {key}."
                )
            is_list = isinstance(getattr(struct(), key), list)
            found.setdefault(section, {})[key] = _items(value) if is_list else value
    return found


def _items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for section, values in other.items():
        target = into.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"Configuration: [{section}] must be a table.")
        target.update(values)


def _check(settings: Settings) -> None:
    server, limits = settings.server, settings.limits
    rules = [
        (0 <= server.port <= 65535, "server.port must be between 0 and 65535"),
        (1 <= server.workers <= 64, "server.workers must be between 1 and 64"),
        (bool(server.tls_cert) == bool(server.tls_key), "server.tls_cert and server.tls_key go together"),
        (
            not (server.tls_dev and server.tls_cert),
            "server.tls_dev makes a certificate itself: leave out tls_cert and tls_key",
        ),
        (
            bool(server.tls_cert) or server.tls_dev or not server.require_tls or server.host in LOOPBACK,
            f"server.require_tls forbids plain text on {server.host}: give tls_cert and tls_key",
        ),
        (server.max_body_bytes >= 1024, "server.max_body_bytes must be at least 1024"),
        (settings.log.slow_seconds >= 0, "log.slow_seconds can't be negative (0: no request is slow)"),
        (limits.reserved_completion_tokens >= 1, "limits.reserved_completion_tokens must be at least 1"),
        (1 <= limits.max_n <= 128, "limits.max_n must be between 1 and 128"),
        (0 <= limits.max_queue <= 4000, "limits.max_queue must be between 0 and 4000"),
    ]
    for origin in settings.network.cors_origins:
        problem = f"network.cors_origins: {origin!r} is no origin such as https://app.example.com"
        rules.append((_ORIGIN.fullmatch(origin) is not None, problem))
    rules += _limit_rules("limits", limits) + _ledger_rules(settings) + _media_rules(settings.media)
    for model in settings.models:
        where = f"models.{model.name}"
        rules += _limit_rules(f"{where}: limits", model.limits)
        problem = f"{where}: limits.budget must be between 0 and 1000000000000, with 6 decimals at most"
        rules.append((_is_amount(model.limits.budget, 10**12), problem))
        rules.append((0 <= model.temperature <= 2, f"{where}: temperature must be between 0 and 2"))
        rules.append((0 < model.top_p <= 1, f"{where}: top_p must be above 0 and at most 1"))
        rules.append((bool(model.engines), f"{where} has no engine: add a [[models.engines]] table"))
        rules.append((model.slow_start >= 0, f"{where}: slow_start can't be negative"))
        rules.append((model.ready_timeout >= 0, f"{where}: ready_timeout can't be negative"))
        for engine in model.engines:
            rules.append((engine.weight >= 0, f"{where}: weight can't be negative"))
            rules.append((engine.stall_timeout > 0, f"{where}: stall_timeout must be above 0"))
            rules += _engine_rules(where, engine)
            rules.append(
                (
                    (engine.kind == "openai") == (model.engines[0].kind == "openai"),
                    f"{where}: an openai upstream can't stand beside an engine that gets token ids",
                )
            )
            rules.append((1 <= engine.replicas <= 64, f"{where}: replicas must be between 1 and 64"))
            rules.append((1 <= engine.batch_size <= 256, f"{where}: batch_size must be between 1 and 256"))
    names = [name for model in settings.models for name in (model.name, *model.aliases)]
    for name in names:
        rules.append((names.count(name) == 1, f"the model name {name!r} is used twice"))
    for ok, problem in rules:
        if not ok:
            raise ConfigError(f"Configuration: {problem}.")


def _engine_rules(where: str, engine: EngineSettings) -> list[tuple[bool, str]]:
    kind = f"an engine of kind {engine.kind}"
    if engine.kind == "openai":
        return [(not engine.managed, f"{where}: {kind} needs base_url")]
    started = bool(engine.command or engine.args or engine.env)
    return [
        (
            not (engine.vision or engine.hearing),
            f"{where}: {kind} gets token ids: vision and hearing are of kind openai",
        ),
        (bool(engine.path) or not engine.managed, f"{where}: {kind} needs path, or base_url where it runs"),
        (
            engine.managed or not started,
            f"{where}: command, args and env are of no use to an engine with a base_url: it runs already",
        ),
        (engine.managed or engine.replicas == 1, f"{where}: one base_url is one replica"),
        (1 <= engine.tensor_parallel <= 1024, f"{where}: tensor_parallel must be between 1 and 1024"),
        *_kv_rules(where, engine),
    ]


def _kv_rules(where: str, engine: EngineSettings) -> list[tuple[bool, str]]:
    named = engine.kv_events not in ("auto", "off")
    places = [engine.kv_events] * named + [engine.kv_replay] * (engine.kv_replay is not None)
    rules = [
        (
            bool(_ENDPOINT.fullmatch(place or "")),
            f"{where}: {place!r} is no ZeroMQ endpoint such as tcp://10.0.0.5:5557",
        )
        for place in places
    ]
    return [
        *rules,
        (
            named or engine.kv_replay is None,
            f"{where}: kv_replay is of no use without an endpoint as kv_events",
        ),
        (
            not named or (engine.kind != "llamacpp" and not engine.managed),
            f"{where}: kv_events names an endpoint of a vllm or sglang engine with a base_url only",
        ),
    ]


def _limit_rules(where: str, limits: LimitSettings | ModelLimitSettings) -> list[tuple[bool, str]]:
    """Upper bounds keep the arithmetic on shared 64-bit cells far from its ends."""
    rules: list[tuple[bool, str]] = []
    for name in ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency"):
        problem = f"{where}.{name} must be between 0 (no limit) and 1000000000000"
        rules.append((0 <= getattr(limits, name) <= 10**12, problem))
    rate = limits.requests_per_second
    ok = rate == 0 or 1e-6 <= rate <= 1e6
    rules.append((ok, f"{where}.requests_per_second must be 0 (no limit) or between 0.000001 and 1000000"))
    rules.append((0 <= limits.burst_seconds <= 3600, f"{where}.burst_seconds must be between 0 and 3600"))
    return rules


def _ledger_rules(settings: Settings) -> list[tuple[bool, str]]:
    ledger = settings.ledger
    code = ledger.currency
    rules = [
        (len(code) == 3 and code.isascii() and code.isupper(), "ledger.currency must be a code such as USD"),
        (ledger.max_journal_bytes >= 2**26, "ledger.max_journal_bytes must be at least 67108864 (64 MiB)"),
        (ledger.retention_days >= 0, "ledger.retention_days can't be negative (0: for ever)"),
        (ledger.usage_retention_days >= 0, "ledger.usage_retention_days can't be negative (0: for ever)"),
    ]
    models = [price.model for price in settings.prices]
    for price in settings.prices:
        rules.append((models.count(price.model) == 1, f"the model {price.model!r} has two prices"))
        for name in ("prompt", "cached", "completion"):
            problem = f"prices.{price.model}: {name} must be between 0 and 1000000, with 6 decimals at most"
            rules.append((_is_amount(getattr(price, name), 10**6), problem))
    return rules


def _media_rules(media: MediaSettings) -> list[tuple[bool, str]]:
    rules = [
        (1 <= media.max_files <= 1000, "media.max_files must be between 1 and 1000"),
        (1024 <= media.max_bytes <= 2**30, "media.max_bytes must be between 1024 and 1073741824 (1 GiB)"),
        (1 <= media.max_pixels <= 10**9, "media.max_pixels must be between 1 and 1000000000"),
        (0 < media.timeout <= 3600, "media.timeout must be above 0 and at most 3600"),
        (0 < media.fetch_timeout <= 3600, "media.fetch_timeout must be above 0 and at most 3600"),
        (media.cache_bytes >= 0, "media.cache_bytes can't be negative (0: nothing is kept)"),
    ]
    for what in ("caption", "transcription"):
        url, model, key = (getattr(media, f"{what}_{field}") for field in ("url", "model", "api_key_env"))
        problem = f"media.{what}_url must begin with http:// or https://"
        rules.append((url is None or url.startswith(("http://", "https://")), problem))
        rules.append(((url is None) == (model is None), f"media.{what}_url and {what}_model go together"))
        rules.append((key is None or url is not None, f"media.{what}_api_key_env needs {what}_url"))
    for network in media.fetch_networks:
        problem = f"media.fetch_networks: {network!r} is no network such as 10.1.0.0/16"
        rules.append((_is_network(network), problem))
    return rules


def _is_network(text: str) -> bool:
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


def _is_amount(amount: Decimal | None, most: int) -> bool:
    return amount is None or (amount.is_finite() and 0 <= amount <= most and amount == round(amount, 6))


def check_files(settings: Settings) -> None:
    """Raises ConfigError for a certificate or key file that can't be read."""
    for path in (settings.server.tls_cert, settings.server.tls_key):
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"Can't read the TLS file {path}.")
