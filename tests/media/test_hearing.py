"""Sound: WAV files of every common kind become the recogniser's samples, and some words come back."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import wave
from array import array
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from deepseek_api_compat.errors import EngineUnavailable, InvalidRequest
from deepseek_api_compat.media import hearing
from deepseek_api_compat.media.hearing import Hearing
from deepseek_api_compat.media.hearing_child import RATE, heard
from deepseek_api_compat.media.recogniser_child import Refused

whole_module = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def listener() -> AsyncIterator[Hearing]:
    hearing = Hearing(timeout=120, longest=30)
    yield hearing
    await hearing.close()


def tone(rate: int, seconds: float, loud: int = 8000, pitch: float = 440) -> array[int]:
    return array("h", (int(loud * math.sin(math.tau * pitch * n / rate)) for n in range(int(rate * seconds))))


def wav(samples: array[int], rate: int, *, channels: int = 1, width: int = 2) -> bytes:
    """The same samples in every channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        one = bytes((sample >> 8) + 128 for sample in samples) if width == 1 else samples.tobytes()
        out.writeframes(
            b"".join(one[place : place + width] * channels for place in range(0, len(one), width))
        )
    return file.getvalue()


def spoken(text: str) -> bytes:
    command = ["espeak-ng", "-v", "en-us", "-s", "130", "--stdout", text]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_sound_made_for_the_model_is_left_as_it_is() -> None:
    samples = tone(RATE, 0.1)
    assert heard(wav(samples, RATE), 10) == heard(wav(samples, RATE, channels=2), 10) == samples
    assert heard(wav(array("h"), RATE), 10) == array("h")


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2])
def test_a_tone_is_the_same_tone_at_every_rate(rate: int, channels: int, width: int) -> None:
    found = heard(wav(tone(rate, 0.2), rate, channels=channels, width=width), 10)
    assert abs(len(found) - 0.2 * RATE) <= 2
    # The mean over a sample's time is that of its middle, half a sample late at most. The end is not exact.
    off = max(abs(a - b) for a, b in zip(found[:-2], tone(RATE, 0.2), strict=False))
    assert off < 8000 * (0.2 if rate > RATE else 0.1) + (256 if width == 1 else 0)


def test_sound_that_lasts_too_long() -> None:
    with pytest.raises(Refused, match="3 s long; at most 2 s"):
        heard(wav(tone(8000, 3), 8000), 2)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"ID3\x04 an mp3", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0"])
def test_what_is_no_wav(content: bytes) -> None:
    with pytest.raises(Refused, match="no WAV file of plain PCM"):
        heard(content, 10)


def test_kinds_of_wav_that_are_not_heard() -> None:
    good = wav(tone(8000, 0.1), 8000)
    three_bytes, no_rate, floats = (bytearray(good) for _ in range(3))
    three_bytes[32:36] = b"\x03\0\x18\0"
    no_rate[24:28] = bytes(4)
    floats[20] = 3
    for content in (three_bytes, no_rate, floats):
        with pytest.raises(Refused):
            heard(bytes(content), 10)


@whole_module
async def test_other_formats_need_an_endpoint(listener: Hearing) -> None:
    with pytest.raises(InvalidRequest, match=r"'mp3' can't be heard here.*transcription endpoint"):
        await listener.listen(b"ID3", "mp3")
    with pytest.raises(InvalidRequest, match="no WAV file"):
        await listener.listen(b"ID3", "wav")


@whole_module
async def test_silence_says_little(listener: Hearing) -> None:
    assert len((await listener.listen(wav(array("h", bytes(RATE)), RATE), "WAV")).split()) <= 1


@whole_module
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng, to speak")
async def test_some_words_come_back(listener: Hearing) -> None:
    heard_words = (await listener.listen(spoken("one two three four five six"), "wav")).split()
    assert len({"one", "two", "three", "four", "five"} & set(heard_words)) >= 3


async def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "installed", lambda: False)
    with pytest.raises(EngineUnavailable, match=r"pip install 'deepseek-api-compat\[speech\]'"):
        await Hearing(timeout=1).listen(b"", "wav")
