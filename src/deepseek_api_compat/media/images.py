"""What a picture's header says: its format and size. Nothing is decoded, so a bomb costs nothing here."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from deepseek_api_compat.errors import InvalidRequest

Size = tuple[int, int]

# Through a file's parts before its size; some milliseconds. Real files have a few hundred at most.
MOST_STEPS = 50_000

_PNG = b"\x89PNG\r\n\x1a\n"
# Every JPEG frame header (SOF), of whatever coding; C4, C8 and CC are something else.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # JPEG markers without a length
_EXTENSION, _FRAME = 0x21, 0x2C  # what may come before a GIF's first frame, and that frame


class Picture(NamedTuple):
    """A picture as it came, and what its header says: `format` is png, jpeg, gif, webp, bmp or tiff;
    `width` and `height` are pixels as stored, before any EXIF orientation."""

    content: bytes
    format: str
    width: int
    height: int


def look(content: bytes, max_pixels: int) -> Picture:
    """Tell format and size from the header.

    Raises InvalidRequest for what is no picture, for a header that is cut off or says nonsense, and for
    more than `max_pixels` pixels.
    """
    found = next((entry for entry in _FORMATS if entry.known(content)), None)
    if found is None:
        raise InvalidRequest(
            "The file is not a picture that can be read; PNG, JPEG, GIF, WebP, BMP and TIFF can.",
            code="invalid_image_format",
        )
    format_ = found.name
    try:
        width, height = found.size(content)
    except (struct.error, IndexError):
        raise _broken(format_) from None
    if width < 1 or height < 1:
        raise _broken(format_)
    if width * height > max_pixels:
        raise InvalidRequest(
            f"The picture has {width} x {height} pixels; at most {max_pixels} are read.",
            code="image_too_large",
        )
    return Picture(content, format_, width, height)


def _broken(format_: str) -> InvalidRequest:
    return InvalidRequest(
        f"The picture's {format_.upper()} header is cut off or broken.", code="image_parse_error"
    )


def _png(content: bytes) -> Size:
    name, width, height = struct.unpack_from(">4sII", content, 12)
    return (width, height) if name == b"IHDR" else (0, 0)


def _jpeg(content: bytes) -> Size:
    place = 2
    for _ in range(MOST_STEPS):
        if content[place] != 0xFF:
            break
        marker = content[place + 1]
        if marker == 0xFF:  # fill bytes
            place += 1
        elif marker in _STANDALONE:
            place += 2
        elif marker in _SOF:
            height, width = struct.unpack_from(">HH", content, place + 5)
            return width, height
        else:
            place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    return 0, 0


def _gif(content: bytes) -> Size:
    # The first frame may reach beyond the screen that the file announces, and decoders then make room.
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    place = 13 + _colours(flags)
    inside = False  # an extension's blocks, which an empty one ends
    for _ in range(MOST_STEPS):
        if inside:
            inside = content[place] > 0
            place += 1 + content[place]
        elif content[place] == _EXTENSION:
            inside = True
            place += 2
        else:
            break
    if inside or content[place] != _FRAME:
        return 0, 0
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", content, place + 1)
    return max(width, left + frame_width), max(height, top + frame_height)


def _colours(flags: int) -> int:
    """Bytes of the colour table that follows."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(content: bytes) -> Size:
    kind = content[12:16]
    if kind == b"VP8X":
        return _number(content, 24) + 1, _number(content, 27) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _number(content: bytes, place: int) -> int:
    low, high = struct.unpack_from("<HB", content, place)
    return int(low | high << 16)


def _bmp(content: bytes) -> Size:
    (header,) = struct.unpack_from("<I", content, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", content, 18)
    return width, abs(height)  # a negative height: stored from the top down


def _tiff(content: bytes) -> Size:
    order = "<" if content[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", content, 4)
    (entries,) = struct.unpack_from(order + "H", content, directory)
    sizes = {256: 0, 257: 0}  # the tags ImageWidth and ImageLength
    for place in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, kind = struct.unpack_from(order + "HH", content, place)
        if tag in sizes:
            sizes[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), content, place + 8)[0]
    return sizes[256], sizes[257]


class _Format(NamedTuple):
    name: str
    known: Callable[[bytes], bool]
    size: Callable[[bytes], Size]


_FORMATS = (
    _Format("png", lambda content: content.startswith(_PNG), _png),
    _Format("jpeg", lambda content: content.startswith(b"\xff\xd8\xff"), _jpeg),
    _Format("gif", lambda content: content.startswith((b"GIF87a", b"GIF89a")), _gif),
    _Format("webp", lambda content: content[:4] == b"RIFF" and content[8:12] == b"WEBP", _webp),
    _Format("bmp", lambda content: content.startswith(b"BM"), _bmp),
    _Format("tiff", lambda content: content.startswith((b"II*\0", b"MM\0*")), _tiff),
)
