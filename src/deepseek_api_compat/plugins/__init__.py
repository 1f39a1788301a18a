"""What the service's plugins are made of; docs/plugins.md shows how to write one.

A plugin is an object with any of these hooks, each a plain function or `async def`:

    pre_process(request, context)   the chat request, before the engine has it
    on_event(event, context)        each part of the answer, as it comes
    post_process(outcome, context)  after the end, however the request ended
    close()                         when the worker ends

Its class is built once in each worker process, with the `options` of the configuration as keyword arguments.
Class attributes say how it is treated; the configuration may say otherwise:

    name        how it is called in logs and metrics; else the name of its class
    on_error    "refuse" (the default): the request it fails in ends in an error; "skip": that goes on without
    timeout     seconds that one call of a hook may take; 5
    quick       True: `on_event` is a plain function that never waits, so it is called in the event loop and
                not in a thread, which is many times faster
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall, Usage

__all__ = [
    "Context",
    "Event",
    "Finish",
    "Outcome",
    "Reasoning",
    "Refuse",
    "Reply",
    "Text",
    "ToolCall",
    "Usage",
]


@dataclass
class Context:
    """One request, as one plugin sees it.

    model: the name in answers, whatever alias was asked for. key_id: the API key's id, never the key.
    data_dir: a place for the plugin's files, which it makes itself. state: its own, for this request.
    """

    request_id: str
    key_id: str
    model: str
    stream: bool
    data_dir: Path
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a request ended. Times in seconds from its arrival; ttft is None if there was no token.

    status: of HTTP; also of an error that came in the middle of a stream. 499: the client left.
    finish: why the first choice ended; None if it did not. error_code: None if there was no error.
    """

    status: int
    finish: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    duration: float
    ttft: float | None
    error_code: str | None
    reasoning_tokens: int = 0  # of completion_tokens


class Refuse(Exception):
    """Raised by a hook to end the request with an error that the client reads, whatever `on_error` says."""

    def __init__(
        self, message: str, *, code: str = "plugin_refused", status: int = 400, param: str | None = None
    ) -> None:
        """`status`: 400 to 599; `param`: the request's field that is to blame."""
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.param = param


@dataclass(frozen=True)
class Reply:
    """Returned by pre_process: the whole answer, for which no engine is asked.

    events: as an engine's answer has them, a Finish for each choice and a Usage last.
    """

    events: Sequence[Event]
