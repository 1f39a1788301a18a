"""Pictures and sound as parts of a message: plain JSON, for any OpenAI client."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

DETAILS = ("auto", "low", "high")
_PICTURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)
_SOUNDS = ((b"ID3", "mp3"), (b"\xff\xfb", "mp3"), (b"\xff\xf3", "mp3"), (b"fLaC", "flac"), (b"OggS", "ogg"))


class ImageInput(dict[str, Any]):
    """A picture in a message's content, beside other parts and bare strings.

    One of: url (`https://...`, which the service fetches, or `data:...`); path of a file; data (the file's
    bytes). detail: "auto", "low" or "high", for a model that sees. Raises ValueError for what is no picture,
    OSError for a file that can't be read.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        data: bytes | None = None,
        detail: str | None = None,
    ) -> None:
        if sum(given is not None for given in (url, path, data)) != 1:
            raise ValueError("ImageInput takes one of url=, path= and data=.")
        if detail is not None and detail not in DETAILS:
            raise ValueError(f"detail must be one of {', '.join(DETAILS)}.")
        if url is None:
            content = data if path is None else Path(path).read_bytes()
            assert content is not None
            url = f"data:{_picture(content)};base64,{base64.b64encode(content).decode()}"
        elif not url.startswith(("http://", "https://", "data:")):
            raise ValueError("url must be http, https or data; for a file of this machine give path=.")
        picture = {"url": url} if detail is None else {"url": url, "detail": detail}
        super().__init__(type="image_url", image_url=picture)


class AudioInput(dict[str, Any]):
    """Sound in a message's content.

    One of: path of a file; data (the file's bytes). format: as the service is told, `"wav"` for example;
    found in the content where it is not given. Raises ValueError for an unknown format, OSError for a file
    that can't be read.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None = None,
        data: bytes | None = None,
        format: str | None = None,
    ) -> None:
        if (path is None) == (data is None):
            raise ValueError("AudioInput takes one of path= and data=.")
        content = data if path is None else Path(path).read_bytes()
        assert content is not None
        sound = {"data": base64.b64encode(content).decode(), "format": format or _sound(content)}
        super().__init__(type="input_audio", input_audio=sound)


def _picture(content: bytes) -> str:
    """Its media type."""
    for beginning, media_type in _PICTURES:
        if content.startswith(beginning):
            return media_type
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError("This is no PNG, JPEG, GIF, WebP, BMP or TIFF picture.")


def _sound(content: bytes) -> str:
    for beginning, name in _SOUNDS:
        if content.startswith(beginning):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return "wav"
    raise ValueError("The sound's format can't be told; give format=, such as \"wav\".")
