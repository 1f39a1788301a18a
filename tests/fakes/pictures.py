"""Pictures with words in them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CHINESE = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")  # Debian's fonts-wqy-microhei


def drawn(
    *lines: str, size: int = 26, width: int = 460, font: Path | None = None, format_: str = "PNG"
) -> bytes:
    """A picture of these lines, black on white."""
    image = Image.new("RGB", (width, 40 + 2 * size * len(lines)), "white")
    pen = ImageDraw.Draw(image)
    letters = ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)
    for number, line in enumerate(lines):
        pen.text((20, 20 + 2 * size * number), line, fill="black", font=letters)
    file = io.BytesIO()
    image.save(file, format_)
    return file.getvalue()


def as_data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
