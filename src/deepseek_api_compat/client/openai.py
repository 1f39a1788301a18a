"""The `openai` package's clients, at home with a DeepSeek service.

`DEEPSEEK_API_KEY` and `DEEPSEEK_BASE_URL` are used where no key or address is given. `auth=` takes an
AuthManager, whose temporary tokens are sent in the place of a key; `register_plugin` a plugin (see
`plugins`). Everything else is the `openai` package's own behaviour, in its majors 1, 2 and 3.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import openai

from deepseek_api_compat.client.auth import AuthManager
from deepseek_api_compat.client.plugins import Plugins

if TYPE_CHECKING:
    from deepseek_api_compat.client.chat import AsyncChat, Chat

if not hasattr(openai, "OpenAI"):
    raise ImportError(
        "This client needs openai 1.0 or later (pip install -U openai). With openai 0.28 use its own style: "
        "openai.api_base = 'http://127.0.0.1:8000/v1'."
    )

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
CHAT = "/chat/completions"
# The package gives all tries of one request one key; with the header's name it sends it.
IDEMPOTENCY = "Idempotency-Key"


class _Extras:
    """What both clients have beyond the package's."""

    plugins: Plugins
    _auth: AuthManager | None
    _api_key: str

    def _equip(self, options: dict[str, Any]) -> dict[str, Any]:
        """Take what is ours out of a client's options, and fill in what is missing."""
        self._auth = options.pop("auth", None)
        self.plugins = options.pop("_plugins", None) or Plugins()
        if self._auth is not None:
            options["api_key"] = self._auth.token()
        elif options.get("api_key") is None:
            options["api_key"] = os.environ.get("DEEPSEEK_API_KEY") or os.environ.get("OPENAI_API_KEY")
        if options.get("base_url") is None:
            options["base_url"] = os.environ.get("DEEPSEEK_BASE_URL") or DEFAULT_BASE_URL
        return options

    @property
    def api_key(self) -> str:
        """What is sent as Bearer. Every try of every request asks for it, so no token is an old one."""
        return self._api_key if self._auth is None else self._auth.token()

    @api_key.setter
    def api_key(self, key: str) -> None:
        self._api_key = key

    def register_plugin(self, plugin: Any) -> None:
        """From now on it sees the messages of chat requests and their answers. Raises TypeError."""
        self.plugins.add(plugin)

    def copy(self, *, _extra_kwargs: Any = None, **options: Any) -> Any:
        """As the package's: a client with other options, and the same auth and plugins."""
        extra: dict[str, Any] = {"_plugins": self.plugins, **(_extra_kwargs or {})}
        if options.get("api_key") is None:
            extra.setdefault("auth", self._auth)
        return super().copy(_extra_kwargs=extra, **options)  # type: ignore[misc]

    with_options = copy


class OpenAI(_Extras, openai.OpenAI):
    """As `openai.OpenAI`; without `base_url` it talks to the service on this machine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**self._equip(options))
        self._idempotency_header = IDEMPOTENCY
        self.__dict__.pop("chat", None)  # openai before 1.60 makes it here

    @cached_property
    def chat(self) -> Chat:
        from deepseek_api_compat.client.chat import Chat

        return Chat(self)

    def post(self, path: str, *, body: Any = None, stream_cls: Any = None, **options: Any) -> Any:
        """As the package's; chat requests go through the plugins."""
        if path != CHAT:
            return super().post(path, body=body, stream_cls=stream_cls, **options)
        from deepseek_api_compat.client.chat import ChunkStream

        cls = stream_cls and ChunkStream
        answer = super().post(path, body=self.plugins.request(body), stream_cls=cls, **options)
        return self.plugins.answer(answer) if _whole(answer) else answer


class AsyncOpenAI(_Extras, openai.AsyncOpenAI):
    """As `openai.AsyncOpenAI`; without `base_url` it talks to the service on this machine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**self._equip(options))
        self._idempotency_header = IDEMPOTENCY
        self.__dict__.pop("chat", None)

    @cached_property
    def chat(self) -> AsyncChat:
        from deepseek_api_compat.client.chat import AsyncChat

        return AsyncChat(self)

    async def post(self, path: str, *, body: Any = None, stream_cls: Any = None, **options: Any) -> Any:
        """As the package's; chat requests go through the plugins."""
        if path != CHAT:
            return await super().post(path, body=body, stream_cls=stream_cls, **options)
        from deepseek_api_compat.client.chat import AsyncChunkStream

        cls = stream_cls and AsyncChunkStream
        answer = await super().post(
            path, body=await self.plugins.request_async(body), stream_cls=cls, **options
        )
        return await self.plugins.answer_async(answer) if _whole(answer) else answer


def _whole(answer: Any) -> bool:
    """A completion: no stream, and no response that is still to be parsed."""
    return hasattr(answer, "choices")
