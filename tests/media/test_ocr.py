"""Words out of pictures: drawn tables, charts, Chinese and a window come back, and no picture does harm."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image, ImageDraw, ImageFont

from deepseek_api_compat.errors import EngineUnavailable, InvalidRequest
from deepseek_api_compat.media import ocr
from deepseek_api_compat.media.images import Picture, look
from deepseek_api_compat.media.layout import Piece, lines
from deepseek_api_compat.media.ocr import Recogniser
from deepseek_api_compat.media.ocr_child import strips

CHINESE = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")  # Debian's fonts-wqy-microhei
MOST = 50_000_000
SAID = "Reading 4096 words"

whole_module = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader() -> AsyncIterator[Recogniser]:
    """One process for all pictures that can be read."""
    recogniser = Recogniser(timeout=120, memory=2 << 30)
    await recogniser.read(saved(Image.new("L", (1, 1))))  # it runs
    yield recogniser
    await recogniser.close()


def saved(image: Image.Image, format_: str = "PNG", **options: object) -> Picture:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return look(file.getvalue(), MOST)


def canvas(width: int, height: int, colour: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def write(pen: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int = 20, colour: str = "black") -> None:
    pen.text((x, y), text, fill=colour, font=ImageFont.load_default(size))


def words(text: str = SAID) -> Image.Image:
    image, pen = canvas(320, 160)
    write(pen, 20, 20, text, 26)
    return image


# What is read.


@whole_module
async def test_a_table_keeps_its_rows_and_cells(reader: Recogniser) -> None:
    rows = [["Region", "Units", "Revenue"], ["North", "1204", "88,310"], ["South", "967", "71,045"]]
    image, pen = canvas(640, 190)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            pen.rectangle((20 + 200 * x, 15 + 52 * y, 220 + 200 * x, 67 + 52 * y), outline="black")
            write(pen, 34 + 200 * x, 28 + 52 * y, cell)
    assert await reader.read(saved(image)) == "\n".join(" | ".join(row) for row in rows)


@whole_module
async def test_a_chart_gives_its_labels(reader: Recogniser) -> None:
    image, pen = canvas(600, 380)
    write(pen, 170, 10, "Requests per second", 24)
    for number, (label, value) in enumerate((("January", 310), ("February", 455), ("March", 780))):
        left, top = 80 + 170 * number, 330 - value // 3
        pen.rectangle((left, top, left + 90, 330), fill="steelblue")
        write(pen, left + 25, top - 28, str(value))
        write(pen, left, 342, label)
    text = await reader.read(saved(image, "JPEG", quality=80))
    read = text.replace("|", " ").split()
    assert {"Requests", "per", "second", "January", "February", "March", "310", "455", "780"} <= set(read)
    assert text.splitlines()[0] == "Requests per second"
    assert text.splitlines()[-1] == "January | February | March"


@whole_module
@pytest.mark.skipif(not CHINESE.exists(), reason="needs the font package fonts-wqy-microhei")
async def test_chinese_is_read(reader: Recogniser) -> None:
    image, pen = canvas(520, 150)
    font = ImageFont.truetype(str(CHINESE), 28)
    pen.text((20, 20), "深度求索发布新模型", fill="black", font=font)
    pen.text((20, 85), "价格：每百万词元八元", fill="black", font=font)
    text = await reader.read(saved(image))
    assert text.replace("：", ":").splitlines() == ["深度求索发布新模型", "价格:每百万词元八元"]


@whole_module
async def test_a_window_with_small_letters_on_two_grounds(reader: Recogniser) -> None:
    image, pen = canvas(480, 230, "#eeeeee")
    pen.rectangle((0, 0, 480, 26), fill="#30507a")
    write(pen, 8, 5, "Settings - Network", 13, "white")
    write(pen, 14, 45, "Host name: gateway-01", 13)
    write(pen, 14, 80, "Connection refused (ECONNREFUSED)", 13)
    pen.rectangle((180, 170, 300, 205), fill="white", outline="gray")
    write(pen, 215, 180, "Try again", 13)
    text = (await reader.read(saved(image, "WEBP", lossless=True))).replace(" ", "")
    for line in ("Settings-Network", "Hostname:gateway-01", "Connectionrefused(ECONNREFUSED)", "Tryagain"):
        assert line in text


@whole_module
async def test_pictures_are_turned_upright_and_laid_on_white(reader: Recogniser) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    lying = saved(words().rotate(90, expand=True), "JPEG", exif=exif.tobytes())
    clear = Image.new("RGBA", (320, 160))
    write(ImageDraw.Draw(clear), 20, 20, SAID, 26)
    assert await reader.read(lying) == SAID
    assert await reader.read(saved(clear)) == SAID


@whole_module
async def test_a_moving_picture_gives_its_first_frame(reader: Recogniser) -> None:
    moving = saved(words(), "GIF", save_all=True, append_images=[words("Something else")])
    assert await reader.read(moving) == SAID


@whole_module
async def test_a_long_screenshot_is_read_in_parts_without_loss(reader: Recogniser) -> None:
    assert strips(300, 2300) == [(0, 1800), (1800, 2300)]
    assert strips(2000, 3000) == [(0, 3000)]
    image, pen = canvas(300, 2300)
    said = {1740: "Before the cut", 1792: "Upon the cut", 1830: "After the cut", 2260: "The end"}
    for y, text in said.items():
        write(pen, 20, y, text)
    assert (await reader.read(saved(image))).splitlines() == list(said.values())


@whole_module
async def test_a_picture_without_text_gives_none(reader: Recogniser) -> None:
    assert await reader.read(saved(Image.new("RGB", (60, 60), "navy"))) == ""


# What can't be.


@whole_module
async def test_damaged_pictures_are_refused_and_the_process_lives_on(reader: Recogniser) -> None:
    good = saved(words())
    cut = Picture(good.content[: len(good.content) // 2], *good[1:])
    lying = saved(Image.new("RGB", (900, 900)))._replace(width=2, height=2)
    pid = reader.pid
    with pytest.raises(InvalidRequest, match="can't be decoded"):
        await reader.read(cut)
    with pytest.raises(InvalidRequest, match="contradicts itself"):
        await reader.read(lying)
    with pytest.raises(InvalidRequest, match="can't be decoded"):  # not looked for in other formats
        await reader.read(good._replace(format="gif"))
    assert reader.pid == pid


def bomb(side: int) -> bytes:
    """A PNG of a megabyte or two that says it has side * side pixels, and has."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(4 * side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@whole_module
async def test_a_bomb_is_refused_by_its_header_and_by_the_memory_there_is(reader: Recogniser) -> None:
    content = bomb(9_000)  # 324 MB of pixels, several times while it is laid on white
    with pytest.raises(InvalidRequest, match="9000 x 9000 pixels"):
        look(content, MOST)
    pid = reader.pid
    with pytest.raises(InvalidRequest, match="more memory to read than there is"):
        await reader.read(look(content, 1 << 30))
    assert await reader.read(saved(words())) == SAID
    assert reader.pid == pid


async def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "installed", lambda: False)
    recogniser = Recogniser(timeout=1)
    with pytest.raises(EngineUnavailable, match=r"pip install 'deepseek-api-compat\[vision\]'"):
        await recogniser.read(saved(words()))
    await recogniser.close()


# The layout, without pictures.


def test_lines_are_what_stands_side_by_side() -> None:
    pieces = [
        Piece("b", 60, 11, 80, 31),  # a little askew
        Piece("c", 84, 12, 100, 32),  # near
        Piece("a", 10, 10, 30, 30),
        Piece("under", 10, 33, 60, 53),
        Piece("small", 67, 36, 90, 46),
    ]
    assert lines(pieces) == "a | b c\nunder small"
    assert lines([]) == ""
