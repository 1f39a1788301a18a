"""What plugins may do to a request and its answer, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import PluginSettings
from deepseek_api_compat.errors import ConfigError, PluginFailed, PluginRefused
from deepseek_api_compat.gateway.metrics import PLUGIN_FAILURES, Tally
from deepseek_api_compat.gateway.plugins import Plugin, Plugins, Run, check, reply_events
from deepseek_api_compat.plugins import Context, Event, Finish, Outcome, Refuse, Reply, Text, ToolCall, Usage
from deepseek_api_compat.protocol.openai import DecodeLimits

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "unknown": 1}).encode()
END = [Finish(0, "stop"), Usage(3, 0, 2)]


class Marks:
    """Puts its mark behind the message, and around the text of the answer."""

    def __init__(self, mark: str = "+") -> None:
        self.name = f"marks{mark}"
        self.mark = mark
        self.ended: list[Outcome] = []

    def pre_process(self, request: dict[str, Any], context: Context) -> None:
        request["messages"][-1]["content"] += self.mark
        context.state["seen"] = True

    def on_event(self, event: Event, context: Context) -> Event | None:
        assert context.state["seen"]
        return Text(event.index, f"{self.mark}{event.text}") if isinstance(event, Text) else None

    def post_process(self, outcome: Outcome, context: Context) -> None:
        self.ended.append(outcome)


class AsyncMarks(Marks):
    async def pre_process(self, request: dict[str, Any], context: Context) -> dict[str, Any]:
        await asyncio.sleep(0)
        super().pre_process(request, context)
        return request

    async def on_event(self, event: Event, context: Context) -> Sequence[Event]:
        await asyncio.sleep(0)
        return [super().on_event(event, context) or event]


class Quick(Marks):
    quick = True


def settings(name: str, **more: Any) -> PluginSettings:
    return PluginSettings(use=f"{__name__}:{name}", **more)


@pytest.fixture
def plugins(tmp_path: Path) -> Any:
    """Makes the plugins of these tables, found in this file."""

    def make(*tables: PluginSettings) -> Plugins:
        return Plugins(tables, tmp_path, DecodeLimits())

    return make


def run_of(plugins: Plugins, names: tuple[str, ...] = ("m",)) -> Run:
    run = plugins.of("req", "key", names, stream=True)
    assert run is not None
    return run


async def stream_of(events: Sequence[Event]) -> AsyncGenerator[list[Event], None]:
    for event in events:
        yield [event]


async def passed(run: Run, *events: Event) -> list[Event]:
    return [event async for group in run.events(stream_of(events)) for event in group]


def content(body: Any) -> str:
    return str(json.loads(body)["messages"][-1]["content"])


def failures(name: str, hook: str) -> float:
    return float(PLUGIN_FAILURES.labels(name, hook)._value.get())


@pytest.mark.parametrize("kind", ["Marks", "AsyncMarks", "Quick"])
async def test_requests_in_order_and_events_in_the_opposite_one(plugins: Any, kind: str) -> None:
    two = plugins(settings(kind, options={"mark": "1"}), settings(kind, options={"mark": "2"}))
    run = run_of(two)
    body = await run.request(BODY)
    assert content(body) == "hello12"
    assert json.loads(body)["unknown"] == 1
    assert await passed(run, Text(0, "a"), Text(0, "b"), *END) == [Text(0, "12a"), Text(0, "12b"), *END]
    await two.close()


async def test_parts_are_passed_on_as_they_come(plugins: Any) -> None:
    run = run_of(plugins(settings("Marks")))
    await run.request(BODY)
    more = asyncio.Event()

    async def slow() -> AsyncGenerator[list[Event], None]:
        yield [Text(0, "a")]
        await more.wait()
        yield [*END]

    stream = run.events(slow())
    assert await stream.__anext__() == [Text(0, "+a")]
    more.set()
    assert await stream.__anext__() == END


async def test_a_plugin_of_other_models_is_not_asked(plugins: Any) -> None:
    some = plugins(settings("Marks", models=["other", "alias"]))
    assert some.of("req", "key", ("m",), stream=False) is None
    assert some.of("req", "key", ("m", "alias"), stream=False) is not None


def hooked(plugins: Plugins, hook: str, does: Any, on_error: str = "skip") -> Run:
    """A run of the plugins, before whose last one there is one that does this."""
    made = Plugin(settings("Marks"))
    made.before = made.each = made.after = None
    made.name, made.on_error, made.timeout = "hooked", on_error, 0.05
    setattr(made, {"pre_process": "before", "on_event": "each"}[hook], does)
    plugins._plugins.insert(0, made)
    return run_of(plugins)


def raises(*_: Any) -> None:
    raise LookupError("of the plugin")


async def sleeps(*_: Any) -> None:
    await asyncio.sleep(60)


def spoils(request: dict[str, Any], context: Context) -> None:
    request["messages"] = "none"


def renames(request: dict[str, Any], context: Context) -> None:
    request["model"] = "another"


BAD_REQUESTS = [
    raises,
    sleeps,
    spoils,
    renames,
    lambda request, context: 7,
    lambda r, c: Reply([Text(0, "a")]),
]
BAD_EVENTS = [
    raises,
    sleeps,
    lambda event, context: 7,
    lambda event, context: [Usage(1, 1, 1)],
    lambda event, context: Text(1, "of another choice"),
    lambda event, context: [Finish(event.index, "stop")],
    lambda event, context: [] if isinstance(event, Finish) else None,
]


@pytest.mark.parametrize("does", BAD_REQUESTS)
async def test_a_failing_pre_process_is_left_out_or_ends_the_request(plugins: Any, does: Any) -> None:
    before = failures("hooked", "pre_process")
    run = hooked(plugins(settings("Marks")), "pre_process", does)
    assert content(await run.request(BODY)) == "hello+"
    assert failures("hooked", "pre_process") == before + 1
    with pytest.raises(PluginFailed, match="hooked"):
        await hooked(plugins(settings("Marks")), "pre_process", does, "refuse").request(BODY)


@pytest.mark.parametrize("does", BAD_EVENTS)
async def test_a_failing_on_event_is_left_out_from_then_on_or_ends_the_answer(
    plugins: Any, does: Any
) -> None:
    before = failures("hooked", "on_event")
    run = hooked(plugins(settings("Marks")), "on_event", does)
    await run.request(BODY)
    assert await passed(run, Text(0, "a"), Text(0, "b"), *END) == [Text(0, "+a"), Text(0, "+b"), *END]
    assert failures("hooked", "on_event") == before + 1
    run = hooked(plugins(settings("Marks")), "on_event", does, "refuse")
    await run.request(BODY)
    with pytest.raises(PluginFailed):
        await passed(run, Text(0, "a"), *END)


async def test_what_blocks_blocks_nobody_else(plugins: Any) -> None:
    """A plain function that waits is given up after its time, and the event loop turns meanwhile."""
    released = threading.Event()
    run = hooked(plugins(settings("Marks")), "pre_process", lambda request, context: released.wait(60))
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    turning = asyncio.create_task(turn())
    try:
        assert content(await run.request(BODY)) == "hello+"
        assert turns > 1
    finally:
        released.set()
        turning.cancel()


async def test_a_change_before_a_failure_does_not_count(plugins: Any) -> None:
    def half(request: dict[str, Any], context: Context) -> None:
        request["messages"].clear()
        raise LookupError

    assert content(await hooked(plugins(settings("Marks")), "pre_process", half).request(BODY)) == "hello+"


@pytest.mark.parametrize("hook", ["pre_process", "on_event"])
async def test_refusing_is_no_failure(plugins: Any, hook: str) -> None:
    def refuses(*_: Any) -> None:
        raise Refuse("Not today.", code="closed", status=403, param="messages")

    before = failures("hooked", hook)
    run = hooked(plugins(settings("Marks")), hook, refuses)

    async def whole() -> None:
        await run.request(BODY)
        await passed(run, Text(0, "a"), *END)

    with pytest.raises(PluginRefused, match="Not today") as refused:
        await whole()
    assert (refused.value.status, refused.value.code, refused.value.param) == (403, "closed", "messages")
    assert failures("hooked", hook) == before


async def test_an_answer_is_seen_by_the_plugins_before_it_alone(plugins: Any) -> None:
    answer = Reply([Text(0, "kept"), *END])
    run = hooked(plugins(settings("Marks")), "pre_process", lambda request, context: answer)
    given = await run.request(BODY)
    assert given is answer
    assert [e async for group in run.events(reply_events(answer)) for e in group] == [*answer.events]

    behind = plugins(settings("Marks"))
    run = hooked(behind, "pre_process", lambda request, context: answer)
    behind._plugins.reverse()
    run = run_of(behind)
    given = await run.request(BODY)
    assert isinstance(given, Reply)
    assert (await passed(run, *given.events))[0] == Text(0, "+kept")


async def test_choices_and_calls_pass_unharmed(plugins: Any) -> None:
    run = run_of(plugins(settings("Marks")))
    await run.request(BODY)
    call = ToolCall(1, 0, "id", "name", "{}")
    assert await passed(run, Text(1, "a"), call, Finish(1, "tool_calls")) == [
        Text(1, "+a"),
        call,
        Finish(1, "tool_calls"),
    ]


async def test_the_end_is_told_with_its_counts(plugins: Any) -> None:
    some = plugins(settings("Marks"))
    tally = Tally("/v1/chat/completions", 0.0)
    tally.status, tally.finish, tally.prompt_tokens, tally.completion_tokens = 200, "stop", 5, 2
    some.ended(run_of(some), tally, left=False)
    some.ended(run_of(some), tally, left=True)
    await some.close()
    told = some._plugins[0].after.__self__.ended
    assert [(one.status, one.finish, one.prompt_tokens, one.error_code) for one in told] == [
        (200, "stop", 5, None),
        (499, "stop", 5, None),
    ]


class Nothing:
    pass


class WrongHook:
    def pre_process(self, request: dict[str, Any]) -> None:
        """It would need the context too."""


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (PluginSettings(use="no-such-plugin"), "no plugin 'no-such-plugin'"),
        (PluginSettings(use="no_such_module:Plugin"), "can't be imported"),
        (settings("NoSuchClass"), "can't be imported"),
        (settings("END"), "is no class"),
        (settings("Nothing"), "none of the hooks"),
        (settings("WrongHook"), "must take"),
        (settings("Marks", options={"wrong": 1}), "can't be made of its options"),
    ],
)
def test_what_can_not_be_used_is_found_before_anything_starts(table: PluginSettings, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check([table])


def test_a_plugin_of_a_file_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "of_a_file.py").write_text("class P:\n    def pre_process(self, request, context): ...\n")
    check([PluginSettings(use="of_a_file:P", path=str(tmp_path))])
