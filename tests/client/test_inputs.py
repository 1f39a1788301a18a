"""Pictures and sound as parts of a message."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat import AudioInput, ImageInput

PNG = b"\x89PNG\r\n\x1a\n and so on"
WAV = b"RIFF\x00\x00\x00\x00WAVEfmt "


def test_a_url() -> None:
    part = ImageInput(url="https://example.com/image.jpg", detail="low")
    assert isinstance(part, dict)
    picture = {"url": "https://example.com/image.jpg", "detail": "low"}
    assert json.loads(json.dumps(part)) == {"type": "image_url", "image_url": picture}
    assert ImageInput("data:image/png;base64,AA==")["image_url"] == {"url": "data:image/png;base64,AA=="}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (PNG, "png"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"GIF89a", "gif"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "webp"),
        (b"BM\x00", "bmp"),
    ],
)
def test_bytes_and_files(content: bytes, kind: str, tmp_path: Path) -> None:
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    file = tmp_path / "picture"
    file.write_bytes(content)
    assert ImageInput(data=content)["image_url"]["url"] == url
    assert ImageInput(path=file) == ImageInput(path=str(file)) == ImageInput(data=content)


def test_sound(tmp_path: Path) -> None:
    encoded = base64.b64encode(WAV).decode()
    assert AudioInput(data=WAV) == {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    file = tmp_path / "sound"
    file.write_bytes(WAV)
    assert AudioInput(path=file) == AudioInput(data=WAV)
    assert AudioInput(data=b"ID3...")["input_audio"]["format"] == "mp3"
    assert AudioInput(data=b"...", format="pcm16")["input_audio"]["format"] == "pcm16"


@pytest.mark.parametrize(
    ("kind", "given", "problem"),
    [
        (ImageInput, {}, "one of url=, path= and data="),
        (ImageInput, {"url": "https://a/b", "data": PNG}, "one of url=, path= and data="),
        (ImageInput, {"url": "photo.png"}, "give path="),
        (ImageInput, {"data": b"hello"}, "no PNG, JPEG"),
        (ImageInput, {"data": PNG, "detail": "great"}, "detail must be one of"),
        (AudioInput, {}, "one of path= and data="),
        (AudioInput, {"data": b"hello"}, "give format="),
    ],
)
def test_what_is_no_input(kind: Any, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        kind(**given)
