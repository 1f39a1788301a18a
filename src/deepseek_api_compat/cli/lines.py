"""JSON lines: one object a line on standard input, one answer a line on standard output."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from deepseek_api_compat.errors import ApiError, InvalidRequest

T = TypeVar("T")

_MISSING = re.compile(r"Object missing required field `(.*)`$")
_PLACE = re.compile(r" - at `\$\.(.*)`$")


def answer_lines(type_: type[T], answer: Callable[[T], dict[str, Any]]) -> int:
    """Write the answer to each line that is not empty, as soon as there is one; returns the exit code.

    A line that is no `type_`, and one for which `answer` raises ApiError, is answered by OpenAI's error
    object, and the next line comes. When nobody reads the answers any longer, that is the end.
    """
    decoder = msgspec.json.Decoder(type_)
    encoder = msgspec.json.Encoder()
    for line in sys.stdin.buffer:
        if line.strip():
            try:
                answered = answer(_decode(decoder, line))
            except ApiError as error:
                answered = error.body()
            try:
                sys.stdout.buffer.write(encoder.encode(answered) + b"\n")
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                _discard_output()
                break
    return 0


def _discard_output() -> None:
    # What is left in the buffer is written when the interpreter ends, and must not fail once more.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _decode(decoder: msgspec.json.Decoder[T], line: bytes) -> T:
    try:
        str(line, "utf-8")  # the decoder does not look into the strings of fields that it skips
        return decoder.decode(line)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The line is not valid UTF-8 (byte {error.start}).") from None
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The line is not valid JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequest("The line is nested too deeply.") from None


def _wrong_field(problem: str) -> InvalidRequest:
    found = _MISSING.search(problem) or _PLACE.search(problem)
    return InvalidRequest(f"The line is not as needed: {problem}.", param=found and found[1])
