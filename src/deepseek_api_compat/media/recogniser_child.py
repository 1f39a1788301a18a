"""The inside of a process that recognises: it dies with its parent, has so much memory, and answers frames.

Frames come on standard input and go to what was standard output: four bytes of length, most significant
first, then the content. An answer is one byte, a status, and UTF-8 text. The first one, READY, comes when
the models are loaded. The process ends with its standard input.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable

from deepseek_api_compat.engines.lifeline import die_with_parent

HEADER = 4
READY, READ, REFUSED = 0, 1, 2
MOST_TEXT = 1 << 20  # bytes of an answer


class Refused(Exception):
    """What was sent can't be read; `str()` says why, to the client."""


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(HEADER, "big") + content


def serve(load: Callable[[list[str]], Callable[[bytes], str]]) -> None:
    """Answer questions with what `load(arguments)` returns, until the parent is gone.

    Command line: the lifeline, bytes of memory, and what is left for `load`. Any exception but Refused and
    MemoryError ends the process, and the parent starts another.
    """
    die_with_parent(int(sys.argv[1]))
    memory = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print don't print into our frames

    def answer(status: int, text: str = "") -> None:
        answers.write(frame(bytes([status]) + text.encode("utf-8", "replace")[:MOST_TEXT]))
        answers.flush()

    recognise = load(sys.argv[3:])
    answer(READY)
    questions = sys.stdin.buffer
    while len(header := questions.read(HEADER)) == HEADER:
        question = questions.read(int.from_bytes(header, "big"))
        try:
            text = recognise(question)
        except Refused as refused:
            answer(REFUSED, str(refused))
        except MemoryError:
            answer(REFUSED, "It takes more memory to read than there is for it.")
        else:
            answer(READ, text)
