"""Models elsewhere that see or hear: behind OpenAI's own API, as the operator configured them."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import msgspec

from deepseek_api_compat.errors import EngineUnavailable

PROMPT = (
    "Describe this picture for someone who can't see it: what it shows, the values and the trend if it is a "
    "chart, and all text in it, word for word and in its own language. Only the description."
)
MOST_TOKENS = 1000  # of a description
MOST_BYTES = 4 << 20  # of an answer


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Transcript(msgspec.Struct):
    text: str


class Endpoint:
    """A server at `url` (such as `https://api.example.com/v1`) and its model of that name.

    key: sent as a bearer token; timeout: seconds for a whole answer. Its methods raise EngineUnavailable for
    whatever goes wrong.
    """

    def __init__(self, url: str, model: str, key: str | None, timeout: float) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout
        self._client: httpx.AsyncClient | None = None

    async def describe(self, url: str, detail: str | None) -> str:
        """What a picture shows; `url`: a data URL of it."""
        picture = {"url": url} if detail is None else {"url": url, "detail": detail}
        parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": picture}]
        asked = {
            "model": self._model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": MOST_TOKENS,
            "temperature": 0,
        }
        answer = await self._post("/chat/completions", "describes pictures", json=asked)
        try:
            return msgspec.json.decode(answer, type=_Completion).choices[0].message.content.strip()
        except (msgspec.MsgspecError, IndexError):
            raise _failed("describes pictures", "answered something that is no description") from None

    async def transcribe(self, content: bytes, format: str) -> str:
        """What is said in a recording."""
        # Servers look at the name's ending. What stands in it is the client's, so only letters and digits.
        ending = "".join(letter for letter in format if letter.isalnum() and letter.isascii())[:10]
        answer = await self._post(
            "/audio/transcriptions",
            "writes down what is said",
            data={"model": self._model, "response_format": "json"},
            files={"file": (f"sound.{ending or 'bin'}", content)},
        )
        try:
            return msgspec.json.decode(answer, type=_Transcript).text.strip()
        except msgspec.MsgspecError:
            raise _failed("writes down what is said", "answered something that is no transcript") from None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _post(self, path: str, what: str, **content: Any) -> bytes:
        if self._client is None:
            self._client = httpx.AsyncClient(headers=self._headers, timeout=self._timeout, trust_env=False)
        asked = self._client.stream("POST", self._url + path, **content)
        try:
            return await asyncio.wait_for(_answer(asked, what), self._timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise _failed(what, "took too long") from None
        except (httpx.HTTPError, httpx.StreamError):
            raise _failed(what, "can't be reached") from None


async def _answer(asked: AbstractAsyncContextManager[httpx.Response], what: str) -> bytes:
    body = bytearray()
    async with asked as response:
        if response.status_code != httpx.codes.OK:
            raise _failed(what, f"answered {response.status_code}")
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MOST_BYTES:
                raise _failed(what, "does not end its answer")
    return bytes(body)


def _failed(what: str, how: str) -> EngineUnavailable:
    return EngineUnavailable(f"The model that {what} {how}.", code="media_endpoint_failed", retry_after=5.0)
