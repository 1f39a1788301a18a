"""Pictures and sound in a conversation, made into what its model can take.

For a model that only reads, each becomes text: what OCR finds in a picture, what a model elsewhere says that
it shows, what is said in a recording. For one that sees, a picture at a URL is fetched here and goes on as
its content, so that nobody makes the model's server connect to where it should not.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable, Coroutine, Hashable
from ipaddress import ip_network
from typing import Any, NamedTuple

from deepseek_api_compat.config import MediaSettings, secret_from_env
from deepseek_api_compat.errors import ApiError, EngineUnavailable, InvalidRequest
from deepseek_api_compat.media import ocr
from deepseek_api_compat.media.cache import TextCache
from deepseek_api_compat.media.endpoints import Endpoint
from deepseek_api_compat.media.fetch import FetchLimits, data_url, fetch
from deepseek_api_compat.media.hearing import Hearing
from deepseek_api_compat.media.images import look

Messages = list[dict[str, Any]]
Count = Callable[[str, str], None]

PICTURE, SOUND = "picture", "sound"
KINDS = {"image_url": PICTURE, "input_audio": SOUND}
AT_ONCE = 8  # files in memory at the same time, on their way to be read
MOST_WAITING = 64
# What marks a text as a picture's. In such a text the same words are written otherwise: nobody's picture can
# end itself and go on as the user.
_MARK = re.compile(r"\[(?=\s*(?:end\s+of\s+)?(?:picture|recording)\b)", re.IGNORECASE)


class _Place(NamedTuple):
    """A part of a message that is a file. `number` counts those of its kind in the conversation, from 1."""

    kind: str
    number: int
    part: dict[str, Any]
    replace: Callable[[dict[str, Any]], None]
    param: str


class Bridge:
    """One for each worker. `count` is called with the kind of each file, and how it went.

    most_bytes: of all files of one conversation together.
    """

    def __init__(self, settings: MediaSettings, most_bytes: int, count: Count) -> None:
        """Raises ConfigError for a key's variable that is not set."""
        self._settings = settings
        self._most_bytes = most_bytes
        self._count = count
        self._limits = FetchLimits(
            settings.max_bytes,
            settings.fetch_timeout,
            networks=tuple(map(ip_network, settings.fetch_networks)),
        )
        self._cache = TextCache(settings.cache_bytes)
        self._describer = _endpoint(
            settings.caption_url, settings.caption_model, settings.caption_api_key_env, settings.timeout
        )
        # Without its extra OCR tells what to install, unless there is a description anyway.
        reads = settings.ocr and (ocr.installed() or self._describer is None)
        self._reader = ocr.Recogniser(timeout=settings.timeout) if reads else None
        self._listener = Hearing(timeout=settings.timeout) if settings.speech else None
        self._transcriber = _endpoint(
            settings.transcription_url,
            settings.transcription_model,
            settings.transcription_api_key_env,
            settings.timeout,
        )
        self._room = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def translate(self, messages: Messages, owner: str, *, sees: bool, hears: bool) -> None:
        """Replace each file in `messages`: by text, or where the model takes it by its content.

        messages: as `decode_chat` accepts them, in plain types. owner: whose they are; what was read for one
        is not used for another, since how long it takes would tell what others asked. sees, hears: whether
        the model does.

        Raises InvalidRequest, EngineUnavailable; a file's fault is told with its place as the `param`.
        """
        places = _places(messages)
        most = self._settings.max_files
        if len(places) > most:
            raise InvalidRequest(
                f"There are {len(places)} pictures and recordings; at most {most} are read.",
                param="messages",
                code="too_many_files",
            )
        if self._waiting + len(places) > MOST_WAITING:
            raise EngineUnavailable(
                "Too many pictures and recordings wait to be read.", code="media_busy", retry_after=5.0
            )
        self._waiting += len(places)
        room = _Room(self._most_bytes)
        try:
            native = {PICTURE: sees, SOUND: hears}
            await _all([self._translate(place, native[place.kind], owner, room) for place in places])
        finally:
            self._waiting -= len(places)

    async def close(self) -> None:
        for one in (self._reader, self._listener, self._describer, self._transcriber):
            if one is not None:
                await one.close()

    async def _translate(self, place: _Place, native: bool, owner: str, room: _Room) -> None:
        result = "failed"
        try:
            async with self._room:
                if native:
                    await self._inline(place, room)
                    result = "native"
                    return
                read = self._read_picture if place.kind == PICTURE else self._read_sound
                text, cached = await read(place.part, place.number, owner, room)
            place.replace({"type": "text", "text": text})
            result = "cached" if cached else "read"
        except ApiError as error:
            if isinstance(error, InvalidRequest):
                result = "refused"
            error.param = error.param or place.param
            raise
        finally:
            self._count(place.kind, result)

    async def _inline(self, place: _Place, room: _Room) -> None:
        if place.kind == SOUND:  # always has its content with it
            return
        picture = _picture_of(place.part)
        content, format_ = await self._picture(picture["url"], room)
        url = await asyncio.to_thread(_as_data_url, content, format_)
        place.replace({"type": "image_url", "image_url": {**picture, "url": url}})

    async def _read_picture(
        self, part: dict[str, Any], number: int, owner: str, room: _Room
    ) -> tuple[str, bool]:
        if self._reader is None and self._describer is None:
            raise _text_only("image_url")
        picture = _picture_of(part)
        content, format_ = await self._picture(picture["url"], room)
        detail = picture.get("detail")
        key = (PICTURE, owner, detail, await _digest(content))
        said, cached = await self._once(key, lambda: self._say(content, format_, detail))
        return _marked(f"Picture {number}", said), cached

    async def _say(self, content: bytes, format_: str, detail: str | None) -> str:
        said = []
        if self._describer is not None:
            url = await asyncio.to_thread(_as_data_url, content, format_)
            description = await self._describer.describe(url, detail)
            if description:
                said.append(f"What it shows, as a model describes it:\n{_harmless(description)}")
        if self._reader is not None:
            words = await self._reader.read(look(content, self._settings.max_pixels))
            if words:
                said.append(f"The text in it, as OCR reads it:\n{_harmless(words)}")
        return "\n".join(said) or "No text is found in it; what else it shows is not known."

    async def _read_sound(
        self, part: dict[str, Any], number: int, owner: str, room: _Room
    ) -> tuple[str, bool]:
        if self._listener is None and self._transcriber is None:
            raise _text_only("input_audio")
        sound = part["input_audio"]
        format_ = sound["format"]
        encoded = sound["data"]
        url = encoded if encoded[:5].lower() == "data:" else f"data:;base64,{encoded}"
        content = await asyncio.to_thread(data_url, url, self._settings.max_bytes)
        room.take(len(content))
        key = (SOUND, owner, format_, await _digest(content))
        said, cached = await self._once(key, lambda: self._hear(content, format_))
        return _marked(f"Recording {number}", said), cached

    async def _hear(self, content: bytes, format_: str) -> str:
        if self._transcriber is not None:
            words = await self._transcriber.transcribe(content, format_)
        else:
            assert self._listener is not None
            words = await self._listener.listen(content, format_)
        return f"What is said in it:\n{_harmless(words)}" if words else "No words are heard in it."

    async def _picture(self, url: str, room: _Room) -> tuple[bytes, str]:
        """A picture's content, and its format, after a look at its header."""
        if url[:5].lower() == "data:":
            content = await asyncio.to_thread(data_url, url, self._settings.max_bytes)
        elif self._settings.fetch:
            content = await fetch(url, self._limits)
        else:
            raise InvalidRequest(
                "URLs are not fetched here; send the picture itself, as a data URL.", code="invalid_url"
            )
        room.take(len(content))
        return content, look(content, self._settings.max_pixels).format

    async def _once(self, key: Hashable, read: Callable[[], Coroutine[Any, Any, str]]) -> tuple[str, bool]:
        text = self._cache.get(key)
        if text is not None:
            return text, True
        text = await read()
        self._cache.put(key, text)
        return text, False


class _Room:
    """Bytes that the files of one conversation may still have."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise InvalidRequest(
                f"The pictures and recordings have more than {self._size} bytes in all.",
                code="file_too_large",
            )


def _endpoint(url: str | None, model: str | None, key_env: str | None, timeout: float) -> Endpoint | None:
    if url is None:
        return None
    assert model is not None, "the configuration was checked"
    return Endpoint(url, model, None if key_env is None else secret_from_env(key_env), timeout)


def _places(messages: Messages) -> list[_Place]:
    found: list[_Place] = []
    numbers = dict.fromkeys(KINDS.values(), 0)
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for j, part in enumerate(content):
            kind = KINDS.get(part.get("type", "")) if isinstance(part, dict) else None
            if kind is None:
                continue
            numbers[kind] += 1

            def replace(new: dict[str, Any], content: list[Any] = content, j: int = j) -> None:
                content[j] = new

            found.append(_Place(kind, numbers[kind], part, replace, f"messages[{i}].content[{j}]"))
    return found


def _picture_of(part: dict[str, Any]) -> dict[str, Any]:
    picture = part["image_url"]
    return {"url": picture} if isinstance(picture, str) else picture


async def _digest(content: bytes) -> bytes:
    """In a thread, as all that takes some milliseconds for each megabyte."""
    return (await asyncio.to_thread(hashlib.sha256, content)).digest()


def _as_data_url(content: bytes, format_: str) -> str:
    return f"data:image/{format_};base64,{base64.b64encode(content).decode()}"


def _marked(name: str, said: str) -> str:
    return f"\n[{name}]\n{said}\n[End of {name.lower()}]\n"


def _harmless(text: str) -> str:
    return _MARK.sub("(", text)


def _text_only(kind: str) -> InvalidRequest:
    return InvalidRequest(f"There is a part of type {kind}, but this model reads text only.")


async def _all(works: list[Coroutine[Any, Any, None]]) -> None:
    """Do them side by side. What the first one to fail raises is raised when all have ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
