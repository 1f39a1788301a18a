"""What a client's plugins do with its chat requests: `client.register_plugin(plugin)`.

A plugin is any object with one or both of

    pre_process(messages)       -> the messages to send: a list of dicts, which may be changed in place
    post_process(answer)        -> what the caller gets: a ChatCompletion, or each chunk of a stream

None stands for what was given. They run in the order of their registration, `post_process` in the opposite
one. With `AsyncOpenAI` they may be coroutine functions. An exception of a plugin is the caller's to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import iscoroutine
from typing import Any

HOOKS = ("pre_process", "post_process")


class Plugins:
    """The plugins of one client."""

    def __init__(self) -> None:
        self._before: list[Any] = []
        self._after: list[Any] = []

    def add(self, plugin: Any) -> None:
        """Raises TypeError for what has no hook."""
        before, after = (getattr(plugin, hook, None) for hook in HOOKS)
        if before is None and after is None:
            raise TypeError(
                f"A plugin has pre_process(messages) or post_process(answer); {plugin!r} has none."
            )
        for hook in (before, after):
            if hook is not None and not callable(hook):
                raise TypeError(f"{hook!r} of {plugin!r} can't be called.")
        if before is not None:
            self._before.append(before)
        if after is not None:
            self._after.insert(0, after)

    @property
    def after(self) -> bool:
        return bool(self._after)

    def request(self, body: object) -> object:
        """The body to send in place of this one, whose messages the caller keeps as they are."""
        if not self._before or not isinstance(body, Mapping):
            return body
        messages = _copied(body)
        for hook in self._before:
            messages = _kept(_done(hook(messages), hook), messages)
        return {**body, "messages": messages}

    def answer(self, answer: Any) -> Any:
        for hook in self._after:
            answer = _kept(_done(hook(answer), hook), answer)
        return answer

    async def request_async(self, body: object) -> object:
        if not self._before or not isinstance(body, Mapping):
            return body
        messages = _copied(body)
        for hook in self._before:
            messages = _kept(await _awaited(hook(messages)), messages)
        return {**body, "messages": messages}

    async def answer_async(self, answer: Any) -> Any:
        for hook in self._after:
            answer = _kept(await _awaited(hook(answer)), answer)
        return answer


def _copied(body: Mapping[str, Any]) -> list[Any]:
    return [
        dict(message) if isinstance(message, Mapping) else message for message in body.get("messages", ())
    ]


def _kept(new: Any, old: Any) -> Any:
    return old if new is None else new


def _done(result: Any, hook: object) -> Any:
    if iscoroutine(result):
        result.close()
        raise TypeError(f"{hook!r} is a coroutine function: it needs AsyncOpenAI.")
    return result


async def _awaited(result: Any) -> Any:
    return await result if iscoroutine(result) else result
