"""The configuration of a LiteLLM proxy (config.yaml), as ours."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from deepseek_api_compat.config import secret_from_env
from deepseek_api_compat.errors import ConfigError, SetupError
from deepseek_api_compat.moving.keys import put_key, sha256
from deepseek_api_compat.moving.result import Model, Moved, money, no_circles, whole
from deepseek_api_compat.security.scope import model_name

# Providers that speak OpenAI's protocol: where, and the variable that LiteLLM reads their key from.
PROVIDERS: dict[str, tuple[str | None, str | None]] = {
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "text-completion-openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "deepseek": ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "groq": ("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "together_ai": ("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "fireworks_ai": ("https://api.fireworks.ai/inference/v1", "FIREWORKS_AI_API_KEY"),
    "xai": ("https://api.x.ai/v1", "XAI_API_KEY"),
    "moonshot": ("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY"),
    "nvidia_nim": ("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY"),
    "cerebras": ("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    "hosted_vllm": (None, None),
    "openai_like": (None, None),
    "custom_openai": (None, None),
    "litellm_proxy": (None, None),
    "lm_studio": (None, None),
    "llamafile": (None, None),
    "xinference": (None, None),
    "ollama": ("http://localhost:11434", None),
    "ollama_chat": ("http://localhost:11434", None),
}
_REFERENCE = "os.environ/"
_MODES = ("chat", "completion", "embedding")
_ROUTING = {
    "simple-shuffle": ("round-robin", "in turn by weight, where LiteLLM draws lots"),
    "least-busy": ("least-load", ""),
    "usage-based-routing": ("least-load", "by load, where LiteLLM counts tokens a minute"),
    "usage-based-routing-v2": ("least-load", "by load, where LiteLLM counts tokens a minute"),
    "latency-based-routing": ("least-load", "by load, where LiteLLM measures latency"),
}
_PRICES = {
    "input_cost_per_token": "prompt",
    "output_cost_per_token": "completion",
    "cache_read_input_token_cost": "cached",
}
_PARAMS = {
    "model",
    "api_base",
    "base_url",
    "api_key",
    "custom_llm_provider",
    "weight",
    "rpm",
    "tpm",
    "max_parallel_requests",
    *_PRICES,
}


def read_config(path: Path) -> Moved:
    """What a config.yaml says. Raises SetupError, which names the line where it is no YAML."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise SetupError(
            "Reading LiteLLM's configuration needs PyYAML: pip install 'deepseek-api-compat[import]'"
        ) from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"Can't read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SetupError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(found, dict):
        raise SetupError(f"{path} is no configuration of LiteLLM: it must be a mapping with model_list.")
    return _Reader(path, found).read()


class _Reader:
    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        self._config = config
        self._environment = self._mapping(config, "environment_variables")
        self.moved = Moved()
        self._used: set[str] = set()
        self._rates: dict[str, dict[str, list[int | None]]] = {}

    def read(self) -> Moved:
        deployments: Any = self._config.get("model_list") or []
        if not isinstance(deployments, list):
            raise SetupError(f"{self._path}: model_list must be a list.")
        for number, deployment in enumerate(deployments, 1):
            self._deployment(f"model_list[{number}]", deployment)
        self._limits()
        self._settings()
        no_circles(self.moved)
        self._variables()
        for name in self._config:
            if name not in {
                "model_list",
                "router_settings",
                "litellm_settings",
                "general_settings",
                "environment_variables",
            }:
                self.moved.report.left(str(name), "there is nothing like it here")
        return self.moved

    def _mapping(self, parent: dict[str, Any], name: str) -> dict[str, Any]:
        found = parent.get(name) or {}
        if not isinstance(found, dict):
            raise SetupError(f"{self._path}: {name} must be a mapping.")
        return {str(key): value for key, value in found.items()}

    def _names(self, place: str, found: Any) -> list[str]:
        """A list of texts; anything else is reported, and taken for an empty one."""
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
        if found:
            self.moved.report.left(place, "it is no list of names")
        return []

    def _deployment(self, place: str, deployment: Any) -> None:
        report = self.moved.report
        if not isinstance(deployment, dict) or not isinstance(deployment.get("model_name"), str):
            raise SetupError(f"{self._path}: {place} must be a mapping with model_name.")
        name = deployment["model_name"]
        place = f"{place} {name}"
        params, info = self._mapping(deployment, "litellm_params"), self._mapping(deployment, "model_info")
        try:
            model_name(name)
            if "*" in name or "*" in str(params.get("model")):
                raise ValueError("a model is named here in full: list the models that clients use")
            if info.get("mode") not in (None, *_MODES):
                raise ValueError(f"models of the mode {info['mode']!r} are not served")
            engine = self._engine(params)
        except (ValueError, ConfigError) as error:
            report.left(place, str(error))
            return
        model = self.moved.model(name)
        model.engines.append(engine)
        rates = self._rates.setdefault(name, {"rpm": [], "tpm": []})
        for rate, found in rates.items():
            found.append(whole(params.get(rate)))
        report.carried(place, f"{engine['base_url']}, {engine['model']}")
        self._price(place, name, {**info, **params})
        for key in params.keys() - _PARAMS:
            report.left(f"{place}: {key}", "there is no such setting of an upstream")
        for group in self._names(f"{place}: access_groups", info.get("access_groups")):
            self.moved.groups.setdefault(group, []).append(name)
        for key in info.keys() - _PRICES.keys() - {"mode", "id", "access_groups"}:
            report.left(f"{place}: model_info.{key}", "a description that is not kept")
        for key in deployment.keys() - {"model_name", "litellm_params", "model_info"}:
            report.left(f"{place}: {key}", "there is nothing like it here")

    def _engine(self, params: dict[str, Any]) -> dict[str, Any]:
        """The engine's table. Raises ValueError or ConfigError with the reason why there can't be one."""
        provider, upstream = _provider(params)
        if provider not in PROVIDERS:
            raise ValueError(
                f"the provider {provider!r} does not speak OpenAI's protocol, or is not known here"
            )
        default, variable = PROVIDERS[provider]
        given = params.get("api_base") or params.get("base_url")
        base = self._value(given) if given else default
        if not base or not base.startswith(("http://", "https://")):
            raise ValueError("it has no api_base that is an http URL")
        base = base.rstrip("/")
        if provider.startswith("ollama") and not base.endswith("/v1"):
            base += "/v1"
        engine: dict[str, Any] = {"kind": "openai", "base_url": base, "model": upstream}
        if key := params.get("api_key"):
            engine["api_key_env"] = self._variable(str(key))
        elif variable and (not given or _is_set(variable) or variable in self._environment):
            engine["api_key_env"] = self._variable(_REFERENCE + variable)
        weight = money(params.get("weight"))
        if weight is not None:
            engine["weight"] = float(weight)
        if concurrency := whole(params.get("max_parallel_requests")):
            engine["concurrency"] = concurrency
        return engine

    def _value(self, given: object) -> str:
        """A setting, or what the variable that it names holds. Raises ConfigError if that is not set."""
        text = str(given)
        if not text.startswith(_REFERENCE):
            return text
        name = text[len(_REFERENCE) :]
        self._used.add(name)
        return str(self._environment.get(name) or secret_from_env(name))

    def _variable(self, key: str) -> str:
        """The name of the variable that holds an upstream's key."""
        if not key.startswith(_REFERENCE):
            return self.moved.secret(key)
        name = key[len(_REFERENCE) :]
        if name in self._environment:
            self.moved.secrets[name] = str(self._environment[name])
        return name

    def _variables(self) -> None:
        """Say which variables must be set when the service starts, but are not set here."""
        engines = [engine for model in self.moved.models.values() for engine in model.engines]
        named = dict.fromkeys(engine.get("api_key_env") for engine in engines)
        for name in named:
            if name and name not in self.moved.secrets and not _is_set(name):
                self.moved.report.partly(
                    f"variable {name}", "not set here; the service needs it at its start"
                )

    def _price(self, place: str, name: str, params: dict[str, Any]) -> None:
        found = {}
        for key, ours in _PRICES.items():
            if params.get(key) is None:
                continue
            per_token = money_per_million(params[key])
            if per_token is None:
                self.moved.report.left(f"{place}: {key}", f"{params[key]!r} is no price")
            else:
                found[ours] = per_token
        if found and self.moved.prices.setdefault(name, found) != found:
            self.moved.report.left(f"{place}: its price", "a model has one price, that of its first upstream")

    def _limits(self) -> None:
        for name, rates in self._rates.items():
            for rate, ours in (("rpm", "requests_per_minute"), ("tpm", "tokens_per_minute")):
                found = [value for value in rates[rate] if value is not None]
                if not found:
                    continue
                place = f"{rate} of {name}"
                if len(found) < len(rates[rate]):
                    self.moved.report.left(
                        place, "not all its upstreams have one, and it holds for the model here"
                    )
                    continue
                self.moved.models[name].limits[ours] = sum(found)
                if len(found) > 1:
                    self.moved.report.partly(place, "the sum holds for the model, not each for its upstream")
                else:
                    self.moved.report.carried(place)

    def _settings(self) -> None:
        report = self.moved.report
        router, general = (self._mapping(self._config, f"{name}_settings") for name in ("router", "general"))
        litellm = self._mapping(self._config, "litellm_settings")
        self._aliases(router.pop("model_group_alias", None) or {})
        if strategy := router.pop("routing_strategy", None):
            routing, how = _ROUTING.get(str(strategy), (None, ""))
            for model in self.moved.models.values():
                model.routing = routing
            if routing is None:
                report.left(f"routing_strategy {strategy}", "there is no such routing; see docs/routing.md")
            else:
                (report.partly if how else report.carried)(f"routing_strategy {strategy}", how)
        for settings in (router, litellm):
            self._fallbacks(settings.pop("fallbacks", None) or [])
        default = self._names("default_fallbacks", litellm.pop("default_fallbacks", None))
        for model in self.moved.models.values():
            model.fallback = model.fallback or [name for name in default if name != model.name]
        self._master_key(general.pop("master_key", None))
        self._allowed(general.pop("allowed_ips", None))
        if general.pop("database_url", None):
            report.left("general_settings: database_url", "its keys come from a dump: --keys DUMP")
        for section, settings in (("router", router), ("litellm", litellm), ("general", general)):
            for key in settings:
                report.left(f"{section}_settings: {key}", "there is nothing like it here")
        for key in self._environment.keys() - self.moved.secrets.keys() - self._used:
            report.left(f"environment_variables: {key}", "no upstream uses it")

    def _aliases(self, aliases: Any) -> None:
        if not isinstance(aliases, dict):
            self.moved.report.left("model_group_alias", "it is no mapping")
            return
        for alias, target in aliases.items():
            name = target.get("model") if isinstance(target, dict) else target
            place = f"alias {alias}"
            taken = alias in self.moved.models or any(
                alias in model.aliases for model in self.moved.models.values()
            )
            if not isinstance(name, str) or name not in self.moved.models:
                self.moved.report.left(place, f"there is no model {name}")
            elif taken:
                self.moved.report.left(place, "another model has this name")
            else:
                self.moved.models[name].aliases.append(str(alias))
                self.moved.report.carried(place)

    def _fallbacks(self, fallbacks: Any) -> None:
        entries = fallbacks if isinstance(fallbacks, list) else [fallbacks]
        for entry in entries:
            if not isinstance(entry, dict):
                self.moved.report.left(f"fallbacks {entry!r}"[:80], "it is no mapping")
                continue
            for name, others in entry.items():
                model: Model | None = self.moved.models.get(name)
                if model is None:
                    self.moved.report.left(f"fallbacks of {name}", "there is no such model")
                else:
                    model.fallback += self._names(f"fallbacks of {name}", others)

    def _master_key(self, given: Any) -> None:
        if not given:
            return
        place = "general_settings: master_key"
        try:
            key = self._value(given)
        except ConfigError as error:
            self.moved.report.left(place, f"{error} Set it and import again")
            return
        fields = {"name": "litellm-master-key", "role": "admin"}
        put_key(self.moved, place, sha256(key), fields, [])

    def _allowed(self, addresses: Any) -> None:
        self.moved.allow = self._names("general_settings: allowed_ips", addresses)
        if self.moved.allow:
            self.moved.report.carried("general_settings: allowed_ips")


def money_per_million(per_token: Any) -> Decimal | None:
    """A price of a token as one of a million; None if it is none."""
    try:
        return money(Decimal(str(per_token)) * 1_000_000)
    except InvalidOperation:
        return None


def _is_set(variable: str) -> bool:
    try:
        return bool(secret_from_env(variable))
    except ConfigError:
        return False


def _provider(params: dict[str, Any]) -> tuple[str, str]:
    """Provider, and the model's name there. Raises ValueError."""
    model = params.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError("litellm_params.model is missing")
    given = params.get("custom_llm_provider")
    if given:
        return str(given), model.removeprefix(f"{given}/")
    provider, slash, name = model.partition("/")
    if slash:
        return provider, name
    if model.startswith("deepseek-"):
        return "deepseek", model
    return "openai" if model.startswith(
        ("gpt-", "chatgpt-", "o1", "o3", "o4", "text-embedding-")
    ) else "?", model
