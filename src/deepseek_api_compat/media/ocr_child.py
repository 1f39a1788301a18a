"""The program that reads pictures: `python -m` and this module's name. Started by `ocr.Recogniser`.

A question is a line, `format width height`, and the picture. RapidOCR's models are those of its wheel;
they are named by their paths, so that it downloads nothing.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_api_compat.media.layout import Piece, lines
from deepseek_api_compat.media.recogniser_child import Refused, serve

# Lines that the recogniser is less sure of are left out; of 1. What it invents where there is no text
# usually has less than 0.5, real words mostly more than 0.8.
SURE = 0.5
LONGEST_SIDE = 2000  # pixels; larger pictures are scaled down to it
# Pixels; pictures whose shorter side has fewer are scaled up to it, to find the lines in them. RapidOCR's own
# 736 takes twice the time, finds no more, and tears words apart in flat pictures.
SHORTEST_SIDE = 480
# Pixels that parts of a long picture see of each other; a line belongs to the part with its middle.
OVERLAP = 100
# C++'s words for it, ONNX Runtime's and OpenCV's.
_NO_MEMORY = re.compile(r"bad_alloc|[Ff]ailed to allocate|[Ii]nsufficient memory")


def load(arguments: list[str]) -> Callable[[bytes], str]:
    """arguments: the number of threads."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import cv2
    import numpy
    import rapidocr
    from PIL import Image

    threads = int(arguments[0])
    cv2.setNumThreads(threads)
    Image.MAX_IMAGE_PIXELS = None  # the question says how many there may be
    models = Path(rapidocr.__file__).parent / "models"
    engine = rapidocr.RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": SURE,
            "Global.max_side_len": LONGEST_SIDE,
            "Det.limit_side_len": SHORTEST_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            **{f"{part.capitalize()}.model_path": _model(models, part) for part in ("det", "cls", "rec")},
        }
    )
    engine(numpy.full((64, 256, 3), 255, numpy.uint8))  # loads the models

    def read(question: bytes) -> str:
        head, _, content = question.partition(b"\n")
        format_, width, height = head.decode().split(" ")
        picture = _decode(content, format_.upper(), (int(width), int(height)))
        pixels = numpy.asarray(picture)[:, :, ::-1]  # it wants blue first
        pieces: list[Piece] = []
        for top, bottom in strips(*picture.size):
            start = max(0, top - OVERLAP)
            found = _recognised(engine, pixels[start : bottom + OVERLAP])
            if found.txts is not None:
                read_here = (_piece(*one, start) for one in zip(found.txts, found.boxes, strict=True))
                pieces += (piece for piece in read_here if top <= (piece.top + piece.bottom) / 2 < bottom)
        return lines(pieces)

    return read


def _recognised(engine: Callable[[Any], Any], pixels: Any) -> Any:
    """What the models find. Raises MemoryError where they had too little, in whatever words."""
    try:
        return engine(pixels)
    except Exception as error:
        if _NO_MEMORY.search(str(error)):
            raise MemoryError from error
        raise


def strips(width: int, height: int) -> list[tuple[int, int]]:
    """Tops and bottoms of what is read at once: a long screenshot in parts, else it is scaled to nothing."""
    if height <= max(LONGEST_SIDE, 2 * width):
        return [(0, height)]
    part = max(width, LONGEST_SIDE - 2 * OVERLAP)
    return [(top, min(top + part, height)) for top in range(0, height, part)]


def _model(models: Path, part: str) -> str:
    return str(sorted(models.glob(f"*_{part}_*.onnx"))[-1])


def _decode(content: bytes, format_: str, size: tuple[int, int]) -> Any:
    """The first picture of a file, upright, on white, RGB. Raises Refused, MemoryError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=[format_]) as opened:
            if opened.size[0] * opened.size[1] > size[0] * size[1]:  # the header was read otherwise here
                raise Refused("The picture's header contradicts itself.")
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError) as error:
        raise Refused("The picture can't be decoded: it is damaged or of an unusual kind.") from error
    return picture


def _piece(text: str, box: Any, down: int) -> Piece:
    """box: four corners, each x and y; down: pixels above the part in which it stands."""
    (left, top), (right, bottom) = box.min(axis=0).tolist(), box.max(axis=0).tolist()
    return Piece(text.strip(), left, top + down, right, bottom + down)


if __name__ == "__main__":
    serve(load)
