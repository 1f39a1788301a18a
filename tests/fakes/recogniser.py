"""A process that recognises nothing, but does what it is told: `python -m fakes.recogniser`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from deepseek_api_compat.media.recogniser_child import Refused, serve


def load(arguments: list[str]) -> Callable[[bytes], str]:
    if arguments == ["broken"]:
        raise ImportError("no models")
    print("a library says hello")  # not into the frames
    return obey


def obey(question: bytes) -> str:
    order = question.decode()
    if order == "hang":
        time.sleep(3600)
    if order == "die":
        os._exit(3)
    if order == "refuse":
        raise Refused("That is no picture.")
    if order == "gorge":
        bytearray(1 << 40)
    if order == "secrets":
        return " ".join(name for name in os.environ if name.startswith("DEEPSEEK_"))
    if order == "flood":
        return "x" * (8 << 20)
    return order.upper()


if __name__ == "__main__":
    serve(load)
