"""What `template_process` and whoever asks it have in common; imports next to nothing."""

from __future__ import annotations

from typing import Any, TypedDict

PROGRAM = "deepseek_api_compat.protocol.template_process"
HEADER = 4  # bytes in front of a frame: its length, most significant byte first

# The first byte of an answer; the rest is UTF-8 text.
RENDERED = b"T"  # the text follows
REFUSED = b"R"  # the template can't render these messages; its reason follows
NO_TEMPLATE = b"N"  # the source is no template; the reason follows
EXHAUSTED = b"M"  # the template takes more memory than it may; the process ends


class Question(TypedDict, total=False):
    """`template` stands for `source`, which comes only with the first question about it.

    `seconds`: of processor time, at most.
    """

    template: int
    source: str
    variables: dict[str, Any]
    seconds: int


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(HEADER, "big") + content
