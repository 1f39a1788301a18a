"""Pictures' headers: format and size of what Pillow wrote, and of what nobody should have written."""

from __future__ import annotations

import io
import random
import struct

import pytest
from PIL import Image

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.media import images
from deepseek_api_compat.media.images import look

MOST = 1_000_000


def drawn(format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (37, 21), "green").save(file, format_, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "comment": b"\xff\xc0 no frame header"}),
        ("GIF", {}),
        ("GIF", {"comment": b"," * 1000}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0II*\0"}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw", "big_endian": True}),
    ],
)
def test_size_and_format_of_every_kind(format_: str, options: dict[str, object]) -> None:
    content = drawn(format_, **options)
    assert look(content, MOST) == (content, format_.lower(), 37, 21)


def test_bitmaps_of_old_and_upside_down() -> None:
    old = b"BM" + bytes(12) + struct.pack("<IHH", 12, 300, 200) + bytes(8)
    upside_down = b"BM" + bytes(12) + struct.pack("<Iii", 40, 300, -200) + bytes(28)
    assert look(old, MOST)[1:] == look(upside_down, MOST)[1:] == ("bmp", 300, 200)


def test_too_many_pixels_are_refused_unread() -> None:
    with pytest.raises(InvalidRequest, match="37 x 21 pixels; at most 776"):
        look(drawn("PNG"), 37 * 21 - 1)
    assert look(drawn("PNG"), 37 * 21).width == 37


def test_a_gif_whose_frame_is_larger_than_its_screen() -> None:
    content = bytearray(drawn("GIF"))
    place = content.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 37, 21))
    content[place + 5 : place + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(InvalidRequest, match="60000 x 60000"):
        look(bytes(content), MOST)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_header_cut_off_anywhere_is_an_error_or_enough(format_: str) -> None:
    content = drawn(format_)
    whole = look(content, MOST)[1:]
    for end in range(len(content)):
        try:
            assert look(content[:end], MOST)[1:] == whole
        except InvalidRequest:
            continue
    with pytest.raises(InvalidRequest, match=f"{format_} header is cut off"):
        look(content[:13], MOST)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damage_is_never_more_than_an_error(format_: str) -> None:
    chance = random.Random(7)
    for _ in range(300):
        content = bytearray(drawn(format_))
        for _ in range(3):
            content[chance.randrange(min(len(content), 700))] = chance.randrange(256)
        try:
            found = look(bytes(content), MOST)
        except InvalidRequest:
            continue
        assert 0 < found.width * found.height <= MOST


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"]
)
def test_what_is_no_picture(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, GIF, WebP, BMP and TIFF") as refused:
        look(content, MOST)
    assert refused.value.code == "invalid_image_format"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8" + b"\xff" * 10**6,
        b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * 10**6,
        b"GIF89a" + bytes(7) + b"!\xfe\0" * 10**6,
    ],
)
def test_a_size_behind_a_million_parts_is_not_searched(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="cut off or broken"):
        look(content, MOST)


@pytest.mark.parametrize(("format_", "parts"), [("JPEG", 2), ("GIF", 2)])
def test_how_many_parts_there_may_be(format_: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = drawn(format_, comment=b"x")
    monkeypatch.setattr(images, "MOST_STEPS", 50)
    assert look(content, MOST).width == 37
    monkeypatch.setattr(images, "MOST_STEPS", parts)
    with pytest.raises(InvalidRequest, match="cut off or broken"):
        look(content, MOST)
