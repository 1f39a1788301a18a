"""The server's plugins: found, built, and called in order, each within its time.

Failure policy: a hook that raises, takes longer than its timeout or returns what it may not has failed. With
`on_error = "refuse"` the request ends in PluginFailed; with "skip" it goes on without that plugin, from the
state before the hook. Refuse is no failure: it ends the request whatever the policy.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from deepseek_api_compat.config import PluginSettings
from deepseek_api_compat.errors import ApiError, ConfigError, InvalidRequest, PluginFailed, PluginRefused
from deepseek_api_compat.gateway.metrics import PLUGIN_FAILURES, PLUGIN_REPLIES, PLUGIN_SECONDS, Tally
from deepseek_api_compat.plugins import Context, Outcome, Refuse, Reply
from deepseek_api_compat.protocol import openai as wire
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall, Usage

GROUP = "deepseek_api_compat.plugins"
HOOKS = ("pre_process", "on_event", "post_process")
# Two of the request's fields are promises already kept: who answers, and in what form.
SETTLED = ("model", "stream")
THREADS = 8  # calls of one plugin's plain functions at the same time
TIMEOUT = 5.0  # seconds, where neither the plugin nor the configuration says
CLOSING = 5.0  # seconds for what is still being done when the worker ends
CLIENT_LEFT = 499
EVENTS = (Text, Reasoning, ToolCall, Finish, Usage)

Events = AsyncGenerator[list[Event], None]
log = logging.getLogger("deepseek_api.plugins")


class Plugin:
    """One plugin of the configuration, ready to be called."""

    def __init__(self, settings: PluginSettings) -> None:
        """Raises ConfigError for one that can't be found, built or called."""
        made = _built(settings)
        self.name = str(getattr(made, "name", None) or type(made).__name__)
        self.on_error = str(settings.on_error or getattr(made, "on_error", "refuse"))
        self.timeout = float(settings.timeout or getattr(made, "timeout", TIMEOUT))
        if self.on_error not in ("refuse", "skip") or self.timeout <= 0:
            raise ConfigError(f"The plugin {self.name} has an on_error or a timeout that makes no sense.")
        self.models = frozenset(settings.models)
        self.before, self.each, self.after = (_hook(made, hook) for hook in HOOKS)
        if not (self.before or self.each or self.after):
            raise ConfigError(f"The plugin {self.name} has none of the hooks {', '.join(HOOKS)}.")
        self.quick = bool(getattr(made, "quick", False))
        self._close = getattr(made, "close", None)
        self._threads: ThreadPoolExecutor | None = None

    async def call(self, hook: Callable[..., Any], *args: Any) -> Any:
        """What a hook returns; a plain function runs in a thread. Raises what it raises, and TimeoutError.

        A thread can't be ended: it goes on behind a timeout, and the plugin has only so many.
        """
        if inspect.iscoroutinefunction(hook):
            return await asyncio.wait_for(hook(*args), self.timeout)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, f"plugin-{self.name}")
        work = asyncio.get_running_loop().run_in_executor(self._threads, hook, *args)
        return await asyncio.wait_for(work, self.timeout)

    async def close(self) -> None:
        try:
            if self._close is not None:
                await self.call(self._close)
        except Exception:
            log.exception("The plugin %s failed in close().", self.name)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


class Plugins:
    """All plugins of a worker."""

    def __init__(self, settings: Sequence[PluginSettings], data_dir: Path, limits: wire.DecodeLimits) -> None:
        self._plugins = [Plugin(each) for each in settings]
        self._data_dir = data_dir
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()

    def __bool__(self) -> bool:
        return bool(self._plugins)

    def of(self, request_id: str, key_id: str, names: Sequence[str], *, stream: bool) -> Run | None:
        """The plugins of one request to the model of these names (its own first); None if it has none."""
        chosen = [one for one in self._plugins if not one.models or not one.models.isdisjoint(names)]
        if not chosen:
            return None
        contexts = [
            (one, Context(request_id, key_id, names[0], stream, self._data_dir / "plugins" / one.name))
            for one in chosen
        ]
        return Run(contexts, self._limits)

    def ended(self, run: Run, tally: Tally, *, left: bool) -> None:
        """Have the plugins told of the end, beside what comes next. `left`: the client did."""
        if run.wants_end:
            outcome = _outcome(tally, left, time.monotonic())
            task = asyncio.get_running_loop().create_task(run.tell(outcome))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING)
        for plugin in self._plugins:
            await plugin.close()


class Run:
    """The plugins of one request. What raises raises PluginFailed or PluginRefused."""

    def __init__(self, plugins: list[tuple[Plugin, Context]], limits: wire.DecodeLimits) -> None:
        self._plugins = plugins
        self._limits = limits
        self._skipped: set[Plugin] = set()
        self.watching = [(one, context) for one, context in reversed(plugins) if one.each is not None]
        self.wants_end = any(one.after is not None for one, _ in plugins)

    async def request(self, body: bytes) -> bytes | Reply:
        """The body that the plugins make of the client's, one that `decode_chat` accepts; or their answer.

        An answer is seen by `on_event` of those alone that come before the one that gave it.
        """
        settled = _settled(body)
        for number, (plugin, context) in enumerate(self._plugins):
            if plugin.before is None:
                continue
            request = wire.decode_object(body)
            try:
                given = await self._timed(plugin, "pre_process", plugin.before, request, context)
                if isinstance(given, Reply):
                    _check_reply(given)
                    PLUGIN_REPLIES.labels(plugin.name).inc()
                    earlier = {one for one, _ in self._plugins[:number]}
                    self.watching = [pair for pair in self.watching if pair[0] in earlier]
                    return given
                changed = self._accepted(request if given is None else given, settled)
            except Exception as error:
                self._failed(plugin, "pre_process", error)
            else:
                body = changed
        return body

    async def events(self, stream: Events) -> Events:
        """The stream as the plugins leave it, part by part."""
        async with aclosing(stream):
            async for group in stream:
                if passed := await self.passed(group):
                    yield passed

    async def passed(self, group: list[Event]) -> list[Event]:
        """What the plugins make of some events."""
        for plugin, context in self.watching:
            if plugin in self._skipped:
                continue
            try:
                group = await self._seen(plugin, group, context)
            except Exception as error:
                self._failed(plugin, "on_event", error)
        return group

    async def tell(self, outcome: Outcome) -> None:
        """Call `post_process`, also of those that failed before."""
        for plugin, context in reversed(self._plugins):
            if plugin.after is None:
                continue
            try:
                await self._timed(plugin, "post_process", plugin.after, outcome, context)
            except Exception as error:
                PLUGIN_FAILURES.labels(plugin.name, "post_process").inc()
                log.error("The plugin %s failed in post_process.", plugin.name, exc_info=error)

    async def _seen(self, plugin: Plugin, group: list[Event], context: Context) -> list[Event]:
        hook = plugin.each
        assert hook is not None
        if inspect.iscoroutinefunction(hook):

            async def each_in_turn() -> list[Any]:
                return [(event, await hook(event, context)) for event in group if not _is_usage(event)]

            given = await self._timed(plugin, "on_event", each_in_turn)
        else:

            def all_in_turn() -> list[Any]:
                return [(event, hook(event, context)) for event in group if not _is_usage(event)]

            given = all_in_turn() if plugin.quick else await self._timed(plugin, "on_event", all_in_turn)
        made: list[Event] = []
        for event, result in given:
            made += _made_of(event, result)
        return made + [event for event in group if _is_usage(event)]

    async def _timed(self, plugin: Plugin, hook: str, call: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        try:
            return await plugin.call(call, *args)
        finally:
            PLUGIN_SECONDS.labels(plugin.name, hook).inc(time.perf_counter() - began)

    def _accepted(self, request: Any, settled: dict[str, Any]) -> bytes:
        """The body of a changed request. Raises TypeError or ValueError for one that it can't be."""
        if not isinstance(request, dict):
            raise TypeError(f"pre_process returned {type(request).__name__}: no dict, no Reply, not None.")
        body = msgspec.json.encode(request)
        try:
            wire.decode_chat(body, self._limits)
        except InvalidRequest as error:
            raise ValueError(f"pre_process made a request that is wrong: {error}") from None
        if changed := [name for name, value in settled.items() if request.get(name) != value]:
            raise ValueError(f"pre_process changed what can't be changed: {', '.join(changed)}.")
        return body

    def _failed(self, plugin: Plugin, hook: str, error: Exception) -> None:
        """Go on without the plugin, or raise what ends the request."""
        if isinstance(error, Refuse):
            raise PluginRefused(error.message, status=error.status, code=error.code, param=error.param)
        PLUGIN_FAILURES.labels(plugin.name, hook).inc()
        if isinstance(error, asyncio.TimeoutError):
            log.error("The plugin %s took longer than %g s in %s.", plugin.name, plugin.timeout, hook)
        else:
            log.error("The plugin %s failed in %s.", plugin.name, hook, exc_info=error)
        if plugin.on_error == "refuse":
            raise PluginFailed(f"The plugin {plugin.name} failed; the service's log says why.") from None
        self._skipped.add(plugin)


def check(settings: Sequence[PluginSettings]) -> None:
    """Raises ConfigError unless all of them can be built; a worker that can't start tells nobody why."""
    for each in settings:
        Plugin(each)


async def reply_events(reply: Reply) -> Events:
    """A plugin's answer as an engine's."""
    yield list(reply.events)


def _built(settings: PluginSettings) -> Any:
    """The object that a plugin's table names."""
    cls = _named(settings)
    try:
        return cls(**settings.options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"The plugin {settings.use!r} can't be made of its options: {error}") from None


def _named(settings: PluginSettings) -> Callable[..., Any]:
    module, colon, attribute = settings.use.partition(":")
    if not colon:
        found = entry_points(group=GROUP, name=settings.use)
        if not found:
            known = sorted({point.name for point in entry_points(group=GROUP)})
            raise ConfigError(
                f"There is no plugin {settings.use!r}: the installed ones are {', '.join(known) or 'none'}; "
                f"one of your own is named as module:Class."
            )
        load: Callable[[], Any] = next(iter(found)).load
    else:
        places = [str(Path(settings.path or ".").expanduser().absolute())]
        sys.path += [place for place in places if place not in sys.path]  # last: nothing installed is hidden

        def load() -> Any:
            return getattr(importlib.import_module(module), attribute)

    try:
        made = load()
    except Exception as error:
        raise ConfigError(
            f"The plugin {settings.use!r} can't be imported: {type(error).__name__}: {error}"
        ) from None
    if not callable(made):
        raise ConfigError(f"The plugin {settings.use!r} is no class.")
    return made  # type: ignore[no-any-return]


def _hook(plugin: Any, name: str) -> Callable[..., Any] | None:
    hook = getattr(plugin, name, None)
    if hook is None:
        return None
    try:
        inspect.signature(hook).bind(None, None)
    except (TypeError, ValueError):
        what = {"pre_process": "request", "on_event": "event", "post_process": "outcome"}[name]
        raise ConfigError(f"{name} of the plugin {plugin!r} must take ({what}, context).") from None
    return hook  # type: ignore[no-any-return]


def _settled(body: bytes) -> dict[str, Any]:
    request = wire.decode_object(body)
    return {name: request.get(name) for name in SETTLED}


def _is_usage(event: Event) -> bool:
    return isinstance(event, Usage)


def _made_of(event: Event, result: Any) -> Sequence[Event]:
    """What on_event made of an event. Raises TypeError, ValueError."""
    if result is None:
        return (event,)
    made: list[Event] = [result] if isinstance(result, EVENTS) else list(result)
    for one in made:
        if not isinstance(one, EVENTS) or isinstance(one, Usage):
            raise TypeError(f"on_event returned {one!r}: no event that may stand here.")
        if isinstance(event, Usage) or one.index != event.index:
            raise ValueError("on_event returned an event of another choice.")
    ends = [one for one in made if isinstance(one, Finish)]
    if ends and made[-1] is not ends[0]:
        raise ValueError("on_event returned something behind a Finish.")
    if bool(ends) != isinstance(event, Finish):
        raise ValueError("on_event has to leave each Finish, and must not make one.")
    return made


def _check_reply(reply: Reply) -> None:
    events = reply.events
    if not events or not all(isinstance(one, EVENTS) for one in events):
        raise TypeError("A Reply is made of events.")
    if not isinstance(events[-1], Usage) or not any(isinstance(one, Finish) for one in events):
        raise ValueError("A Reply ends with a Finish for each choice and a Usage.")


def _outcome(tally: Tally, left: bool, now: float) -> Outcome:
    error: ApiError | None = tally.error
    status = CLIENT_LEFT if left else error.status if error is not None else tally.status
    return Outcome(
        status=status,
        finish=tally.finish,
        prompt_tokens=tally.prompt_tokens,
        cached_tokens=tally.cached_tokens,
        completion_tokens=tally.completion_tokens,
        duration=now - tally.start,
        ttft=tally.first - tally.start if tally.first else None,
        error_code=None if error is None else error.code or error.type,
        reasoning_tokens=tally.reasoning_tokens,
    )
