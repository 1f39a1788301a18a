"""Pictures and sound on their way to a model. What reads them is loaded with the first one."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING

from deepseek_api_compat.config import Settings
from deepseek_api_compat.gateway.metrics import MEDIA
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.protocol import openai as wire

if TYPE_CHECKING:
    from deepseek_api_compat.media.bridge import Bridge


class Sight:
    """One for each worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bridge: Bridge | None = None

    async def translated(self, body: bytes, pool: ModelPool, owner: str) -> bytes:
        """The body of a request with `messages`, in which there is no file but such as the model takes.

        owner: the id of the key. Raises InvalidRequest, EngineUnavailable.
        """
        messages = wire.messages_of(body)
        bridge = await self._loaded()
        engines = pool.settings.engines
        await bridge.translate(
            messages,
            owner,
            sees=all(engine.vision for engine in engines),
            hears=all(engine.hearing for engine in engines),
        )
        return wire.reencode(body, {"messages": messages})

    async def close(self) -> None:
        if self._bridge is not None:
            await self._bridge.close()

    async def _loaded(self) -> Bridge:
        if self._bridge is None:
            module = await asyncio.to_thread(import_module, "deepseek_api_compat.media.bridge")
            settings = self._settings
            # Another request may have waited for it too.
            self._bridge = self._bridge or module.Bridge(
                settings.media, settings.server.max_body_bytes, _count
            )
        return self._bridge


def _count(kind: str, result: str) -> None:
    MEDIA.labels(kind, result).inc()
