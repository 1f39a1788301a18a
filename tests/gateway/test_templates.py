"""Templates rendered in their process: what comes back, and what a hostile or dying one does to the rest."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deepseek_api_compat.engines.base import ModelInfo
from deepseek_api_compat.errors import InternalError, InvalidRequest
from deepseek_api_compat.gateway import templates as module
from deepseek_api_compat.gateway.templates import Broke, RenderProcess, Templates
from deepseek_api_compat.protocol.openai import ChatRequest, DecodeLimits, decode_chat
from deepseek_api_compat.protocol.segment import Prompt, Segment
from deepseek_api_compat.protocol.template_frames import RENDERED

BOTH_LOOPS = True

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"
SYSTEM_LAST = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ECHO


def model(template: str | None) -> ModelInfo:
    return ModelInfo(1024, 1, template, "<s>", "</s>", {"<s>": 1, "</s>": 2})


def request(*contents: str, role: str = "user") -> ChatRequest:
    messages = [{"role": role, "content": content} for content in contents or ("Hi",)]
    return decode_chat(json.dumps({"model": "m", "messages": messages}).encode(), DecodeLimits())


def text(prompt: Prompt) -> str:
    return "".join(segment.text for segment in prompt.segments)


@pytest.fixture
async def process() -> AsyncIterator[RenderProcess]:
    process = RenderProcess()
    yield process
    await process.close()


@pytest.fixture
async def impatient() -> AsyncIterator[RenderProcess]:
    process = RenderProcess(render_time=0.3)
    yield process
    await process.close()


@pytest.fixture
def templates(process: RenderProcess) -> Templates:
    return Templates(process)


async def test_a_prompt(templates: Templates) -> None:
    assert await templates.prompt(model("{{ bos_token }}" + ECHO + "<think>\n "), request("a</s>")) == Prompt(
        [Segment("<s>", True), Segment("a</s><think>\n ", False)], "reasoning"
    )
    assert await templates.prompt(model(None), request()) == Prompt(
        [Segment("User: Hi\n\nAssistant:", False)]
    )


async def test_no_process_before_it_is_needed(process: RenderProcess, templates: Templates) -> None:
    await templates.prompt(model(None), request())
    assert process.pid is None
    await templates.warm()
    pid = process.pid
    await templates.prompt(model(ECHO), request())
    assert process.pid == pid is not None


async def test_many_at_the_same_time(templates: Templates) -> None:
    made = [templates.prompt(model(ECHO + str(n % 7)), request(f"{n}:")) for n in range(200)]
    assert [text(one) for one in await asyncio.gather(*made)] == [f"{n}:{n % 7}" for n in range(200)]


async def test_a_template_refuses(templates: Templates) -> None:
    with pytest.raises(InvalidRequest, match="can't render these messages: no user") as caught:
        await templates.prompt(model("{{ raise_exception('no user') }}"), request())
    assert caught.value.param == "messages"
    assert text(await templates.prompt(model(SYSTEM_LAST), request("A", role="system"))) == "A"


async def test_a_template_with_a_syntax_error_is_not_the_clients_fault(templates: Templates) -> None:
    for _ in range(2):
        with pytest.raises(InternalError, match="chat template is not valid"):
            await templates.prompt(model("{% for %}"), request())
    with pytest.raises(InternalError, match="far too long"):
        await templates.prompt(model("'" * (1 << 21)), request())


async def test_a_template_that_never_ends_delays_others_only(impatient: RenderProcess) -> None:
    templates = Templates(impatient)
    endless = asyncio.ensure_future(templates.prompt(model(LOOP), request()))
    await asyncio.sleep(0)  # it is first
    others = [templates.prompt(model(ECHO), request(str(n))) for n in range(5)]
    assert [text(one) for one in await asyncio.gather(*others)] == list("01234")
    with pytest.raises(InternalError, match="takes too long"):
        await endless


async def test_a_template_that_takes_all_memory(templates: Templates) -> None:
    if sys.platform != "linux":
        pytest.skip("memory is limited on Linux")
    with pytest.raises(InternalError, match="too much memory"):
        await templates.prompt(model("{{ 'x' * 10**12 }}"), request())
    assert text(await templates.prompt(model(ECHO), request())) == "Hi"


async def test_a_prompt_that_is_too_long(templates: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_ANSWER", 1000)
    with pytest.raises(InternalError, match="too long"):
        await templates.prompt(model("{{ 'x' * 10000000 }}"), request())
    assert text(await templates.prompt(model(ECHO), request())) == "Hi"


async def test_a_template_that_breaks_again_and_again_rests(impatient: RenderProcess) -> None:
    templates = Templates(impatient)
    hostile = model("{% if messages[0].content == 'ok' %}ok{% else %}" + LOOP + "{% endif %}")
    for content in ("x", "ok", "x", "x", "x"):  # "in a row": what works in between counts
        if content == "ok":
            assert text(await templates.prompt(hostile, request("ok"))) == "ok"
        else:
            with pytest.raises(InternalError, match="takes too long"):
                await templates.prompt(hostile, request(content))
    with pytest.raises(InternalError, match="3 times in a row") as caught:
        await templates.prompt(hostile, request("ok"))
    assert caught.value.retry_after == pytest.approx(module.REFUSED_FOR, abs=5)
    assert impatient.pid is None  # nothing was started for it
    assert text(await templates.prompt(model(ECHO), request())) == "Hi"


async def test_a_killed_process_goes_unnoticed(templates: Templates, process: RenderProcess) -> None:
    await templates.warm()
    for _ in range(2):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        assert text(await templates.prompt(model(ECHO), request())) == "Hi"


async def test_a_caller_that_leaves_takes_nothing_with_it(templates: Templates) -> None:
    await templates.warm()
    for _ in range(20):
        leaving = asyncio.ensure_future(templates.prompt(model(ECHO), request("mine" * 1000)))
        other = asyncio.ensure_future(templates.prompt(model(ECHO), request("other")))
        await asyncio.sleep(0)
        leaving.cancel()
        assert text(await other) == "other"
        with pytest.raises(asyncio.CancelledError):
            await leaving


async def test_large_requests(process: RenderProcess, templates: Templates) -> None:
    contents = [f"{n} <s> {'é' * 200}" for n in range(5000)]
    made = await templates.prompt(model("{{ bos_token }}" + ECHO), request(*contents))
    assert text(made) == "<s>" + "".join(contents)
    assert [one.text for one in made.segments if one.special] == ["<s>"]
    assert text(await templates.prompt(model(ECHO), request("x" * 4_000_000))) == "x" * 4_000_000


async def test_it_dies_with_its_owner(process: RenderProcess) -> None:
    await process.warm()
    pid = process.pid
    assert pid is not None
    await process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(Broke):
        await process.ask(ECHO, b"{}")


async def test_closing_does_not_wait_for_a_render() -> None:
    slow = RenderProcess(render_time=600)
    await slow.warm()
    asking = asyncio.ensure_future(slow.ask(LOOP, b"{}"))
    await asyncio.sleep(0.05)  # it is rendering, on a quick machine; the outcome is the same if not yet
    await asyncio.wait_for(slow.close(), 5)
    with pytest.raises(Broke):
        await asking


async def test_secrets_of_the_service_are_not_handed_on(
    process: RenderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "secret-value")
    assert (await process.ask("{{ 1 }}", b"{}")) == (RENDERED, "1")
    if sys.platform == "linux":
        assert b"secret-value" not in Path(f"/proc/{process.pid}/environ").read_bytes()  # noqa: ASYNC240
