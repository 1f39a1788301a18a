"""A prompt as a list of segments: control tokens, and text between them.

Only what this package, or a model's own template, writes becomes a control token. Text from a request
stays text, whatever it spells, so that no message can close its own turn or open another's.
"""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """A piece of a prompt; `special` where it is one control token, spelled out."""

    text: str
    special: bool


class Prompt(NamedTuple):
    """A rendered prompt, and where it leaves the answer.

    start: "content" or "reasoning" (the answer begins there), either with "_continuation" (the answer goes
    on with a message), "tool_calls" (the block of calls is open), or "either": the model may open its
    reasoning itself.
    """

    segments: list[Segment]
    start: str = "content"
