"""Limits of several machines, counted in one Redis. What is counted, and how, is in `limits.lua`."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec

from deepseek_api_compat.errors import ConfigError, DeepSeekError

if TYPE_CHECKING:
    from redis.asyncio import Redis

PREFIX = "deepseek:limits:"
TIMEOUT = 0.25  # seconds: a limiter must not make a request wait longer than that for a Redis that hangs


class Reply(msgspec.Struct):
    """What a step found.

    refused: (1 key or 2 model, which limit, seconds or what is left); requests, tokens: limit, what is left,
    seconds until all is back; key, model: what is spent, and the tokens of which day; usage: as in Usage.
    """

    refused: list[tuple[int, str, float]] | dict[str, Any] = []
    requests: tuple[int, int, float] | None = None
    tokens: tuple[int, int, float] | None = None
    key: tuple[int, int, int] | None = None
    model: tuple[int, int, int] | None = None
    usage: tuple[int, int, int, int, int] | None = None


class RedisAway(DeepSeekError):
    """Redis can't be reached, takes too long, or answers with an error."""


_decode = msgspec.json.Decoder(Reply).decode


class RedisCounters:
    """One worker's connections to the Redis of all.

    Failure policy: every fault is RedisAway, within 0.25 s; what was asked for may still happen then.
    """

    def __init__(self, url: str, place: str, nonce: str) -> None:
        """`place` names this worker among all machines, `nonce` tells it from the one before it there.

        Raises ConfigError if the client is not installed, or the URL makes no sense.
        """
        try:
            from redis.asyncio import Redis
            from redis.exceptions import RedisError
        except ImportError:
            problem = "limits.redis_url needs the extra redis: pip install 'deepseek-api-compat[redis]'"
            raise ConfigError(f"Configuration: {problem}.") from None
        self._faults: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        try:
            self._redis: Redis = Redis.from_url(
                url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=None
            )
        except ValueError as error:
            raise ConfigError(f"Configuration: limits.redis_url: {error}.") from None
        source = files("deepseek_api_compat.store").joinpath("limits.lua").read_text("utf-8")
        self._script = self._redis.register_script(source)
        self._place = f"{PREFIX}grants:{place}/"
        self._grants = self._place + nonce

    async def step(self, operation: str, key: str, model: str, arguments: dict[str, Any]) -> Reply:
        """One step of a request by the key with this id, for the model of this name ("": not known yet)."""
        keys = [f"{PREFIX}key:{key}", f"{PREFIX}model:{model}", self._grants]
        return await self._call(operation, keys, arguments)

    async def beat(self, patience: float, now: float | None = None) -> None:
        """Say that this worker lives, and forget those that said so longer than `patience` seconds ago."""
        arguments: dict[str, Any] = {"place": self._place, "patience": patience}
        if now is not None:
            arguments["now"] = now
        await self._call("beat", [f"{PREFIX}beats", "", self._grants], arguments)

    async def close(self) -> None:
        await self._redis.aclose()

    async def _call(self, operation: str, keys: list[str], arguments: dict[str, Any]) -> Reply:
        try:
            answer = await self._script(keys=keys, args=[operation, msgspec.json.encode(arguments)])
        except self._faults as error:
            raise RedisAway(str(error) or type(error).__name__) from None
        return _decode(answer)
