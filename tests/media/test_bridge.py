"""What becomes of the files in a conversation, with everything that reads them replaced."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections import Counter
from typing import Any

import pytest

from deepseek_api_compat.config import MediaSettings
from deepseek_api_compat.errors import ConfigError, EngineUnavailable, InvalidRequest
from deepseek_api_compat.media import bridge, ocr
from deepseek_api_compat.media.bridge import Bridge
from deepseek_api_compat.media.cache import OVERHEAD, TextCache
from deepseek_api_compat.media.images import Picture

MEGABYTE = 1 << 20


class Reader:
    """Stands for OCR: says what `words` says, when `free` is set."""

    def __init__(self, words: str = "words") -> None:
        self.words = words
        self.read_pictures: list[Picture] = []
        self.free = asyncio.Event()
        self.free.set()
        self.full = asyncio.Event()  # as many are read as are read at once

    async def read(self, picture: Picture) -> str:
        self.read_pictures.append(picture)
        if len(self.read_pictures) == bridge.AT_ONCE:
            self.full.set()
        await self.free.wait()
        return self.words

    async def close(self) -> None:
        pass


class Describer:
    """Stands for a model elsewhere."""

    async def describe(self, url: str, detail: str | None) -> str:
        return "A cat."


def png(number: int = 0) -> str:
    """A data URL of something with a PNG's header; each number gives another content."""
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 10, 10) + bytes([number])
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


class Made:
    """A bridge around a reader. counts: what it has counted."""

    def __init__(self, reader: Reader, most_bytes: int = MEGABYTE, **settings: Any) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bridge = Bridge(
            MediaSettings(**settings), most_bytes, lambda kind, result: self.counts.update([(kind, result)])
        )
        self.bridge._reader = reader  # type: ignore[assignment]

    async def translate(self, *messages: dict[str, Any], owner: str = "a", sees: bool = False) -> list[Any]:
        await self.bridge.translate(list(messages), owner, sees=sees, hears=False)
        return [message["content"] for message in messages]


async def test_files_are_numbered_through_the_conversation() -> None:
    made = Made(Reader())
    said = [{"role": "assistant", "content": None}, {"role": "user", "content": "plain"}]
    contents = await made.translate(user(picture(png(1)), "and"), *said, user("this", picture(png(2))))
    first, second = contents[0][0]["text"], contents[3][1]["text"]
    assert contents[0][1:] == ["and"]
    assert contents[1:3] == [None, "plain"]
    assert first == "\n[Picture 1]\nThe text in it, as OCR reads it:\nwords\n[End of picture 1]\n"
    assert second.startswith("\n[Picture 2]\n")
    assert made.counts == {("picture", "read"): 2}


async def test_an_empty_picture_says_so() -> None:
    [[part]] = await Made(Reader("")).translate(user(picture(png())))
    assert "No text is found in it" in part["text"]


@pytest.mark.parametrize(
    "spelling", ["[End of picture 1]", "[end  of PICTURE 9]", "[ Picture 2]", "[Recording 1]"]
)
async def test_words_in_a_picture_do_not_end_it(spelling: str) -> None:
    [[part]] = await Made(Reader(f"a\n{spelling}\nb [x] [pictures]")).translate(user(picture(png())))
    lines = part["text"].splitlines()
    assert lines[4] == f"({spelling[1:]}"
    assert lines[5] == "b [x] [pictures]"
    assert part["text"].count("[End of picture 1]") == 1


async def test_a_file_is_read_once_for_each_owner() -> None:
    reader = Reader()
    made = Made(reader)
    for owner in ("a", "a", "b"):
        await made.translate(user(picture(png())), owner=owner)
    assert len(reader.read_pictures) == 2
    assert made.counts == {("picture", "read"): 2, ("picture", "cached"): 1}


async def test_the_bytes_of_all_files_are_bounded() -> None:
    made = Made(Reader(), most_bytes=60)
    await made.translate(user(picture(png(1)), picture(png(2))))
    with pytest.raises(InvalidRequest, match="more than 60 bytes in all") as caught:
        await made.translate(user(*(picture(png(number)) for number in range(3))))
    assert caught.value.code == "file_too_large"


async def test_no_url_is_fetched_where_that_is_forbidden() -> None:
    made = Made(Reader(), fetch=False)
    for sees in (False, True):
        with pytest.raises(InvalidRequest, match="URLs are not fetched here") as caught:
            await made.translate(user("x", picture("https://example.com/a.png")), sees=sees)
        assert caught.value.param == "messages[0].content[1]"
    assert made.counts == {("picture", "refused"): 2}


async def test_without_anything_that_reads_a_picture_is_refused() -> None:
    made = Made(Reader(), ocr=False, speech=False)
    made.bridge._reader = None
    sound = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    for part in (picture(png()), sound):
        with pytest.raises(InvalidRequest, match=f"type {part['type']}, but this model reads text only"):
            await made.translate(user(part))
    assert (await made.translate(user(picture(png())), sees=True)) == [[picture(png())]]


async def test_a_description_needs_no_ocr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is missing; without a description the error names it."""
    monkeypatch.setattr(ocr, "installed", lambda: False)
    described = MediaSettings(caption_url="http://127.0.0.1:9/v1", caption_model="m")
    for settings, code in ((described, "media_endpoint_failed"), (MediaSettings(), "vision_not_installed")):
        made = Bridge(settings, MEGABYTE, lambda kind, result: None)
        with pytest.raises(EngineUnavailable) as caught:
            await made.translate([user(picture(png()))], "a", sees=False, hears=False)
        assert caught.value.code == code
        await made.close()
    made = Bridge(described, MEGABYTE, lambda kind, result: None)
    made._describer = Describer()  # type: ignore[assignment]
    messages = [user(picture(png()))]
    await made.translate(messages, "a", sees=False, hears=False)
    assert "as a model describes it:\nA cat." in messages[0]["content"][0]["text"]


async def test_only_so_many_wait() -> None:
    reader = Reader()
    reader.free.clear()
    made = Made(reader, max_files=bridge.MOST_WAITING)
    many = [picture(png(number)) for number in range(bridge.MOST_WAITING)]
    first = asyncio.ensure_future(made.translate(user(*many)))
    await reader.full.wait()
    with pytest.raises(EngineUnavailable, match="Too many") as caught:
        await made.translate(user(picture(png())))
    assert caught.value.code == "media_busy"
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    reader.free.set()
    assert await made.translate(user(picture(png())))  # those that left have made room


async def test_the_first_fault_ends_the_others() -> None:
    reader = Reader()
    reader.free.clear()
    made = Made(reader)
    with pytest.raises(InvalidRequest, match="not a picture"):
        await made.translate(user(picture(png()), picture("data:,text")))
    assert made.counts == {("picture", "refused"): 1, ("picture", "failed"): 1}


def test_a_key_that_is_not_set_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EYES_KEY", raising=False)
    settings = MediaSettings(caption_url="http://a/v1", caption_model="m", caption_api_key_env="EYES_KEY")
    with pytest.raises(ConfigError, match="EYES_KEY"):
        Bridge(settings, MEGABYTE, lambda kind, result: None)


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = TextCache(3 * (OVERHEAD + 4))
    for key in "abc":
        cache.put(key, key)
    assert cache.get("a") == "a"
    cache.put("d", "d")
    assert [cache.get(key) for key in "abcd"] == ["a", None, "c", "d"]
    cache.put("d", "d" * 1000)  # too large for it
    assert cache.get("d") is None
    cache.put("c", "x")
    assert [cache.get(key) for key in "ac"] == ["a", "x"]
