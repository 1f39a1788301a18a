"""The process apart: it comes, goes, hangs and dies, and only ever costs an answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deepseek_api_compat.errors import EngineUnavailable, InvalidRequest
from deepseek_api_compat.media.recogniser_process import RecogniserProcess
from fakes.observe import alive, descendants
from fakes.service import eventually

BOTH_LOOPS = True
TESTS = Path(__file__).parent.parent
Make = Callable[..., RecogniserProcess]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    made: list[RecogniserProcess] = []

    def make(*arguments: str, timeout: float = 60, idle: float = 60) -> RecogniserProcess:
        made.append(
            RecogniserProcess(
                "fakes.recogniser", "The picture", *arguments, timeout=timeout, idle=idle, memory=1 << 30
            )
        )
        return made[-1]

    yield make
    for process in made:
        await process.close()


async def test_questions_are_answered_in_order_by_one_process(make: Make) -> None:
    process = make()
    assert process.pid is None  # not before there is work
    answers = await asyncio.gather(*(process.ask(word) for word in (b"one", b"two", b"three")))
    assert answers == ["ONE", "TWO", "THREE"]
    pid = process.pid
    assert await process.ask("ä".encode() * 3_000_000) == "Ä" * (1 << 19)  # an answer has its end
    assert process.pid == pid
    await process.close()
    assert not alive(pid or 0)
    with pytest.raises(EngineUnavailable):
        await process.ask(b"again")


async def test_refusals_are_the_clients_to_hear(make: Make) -> None:
    process = make()
    with pytest.raises(InvalidRequest, match="That is no picture"):
        await process.ask(b"refuse")
    pid = process.pid
    with pytest.raises(InvalidRequest, match="more memory to read than there is"):
        await process.ask(b"gorge")
    assert await process.ask(b"fine") == "FINE"
    assert process.pid == pid


async def test_a_death_costs_one_answer(make: Make) -> None:
    process = make()
    with pytest.raises(EngineUnavailable, match="the process that reads it ended"):
        await process.ask(b"die")
    assert await process.ask(b"fine") == "FINE"


async def test_one_that_hangs_is_killed_and_replaced(make: Make) -> None:
    process = make(timeout=0.2)
    hanging = asyncio.create_task(process.ask(b"hang"))
    with pytest.raises(EngineUnavailable, match=r"The picture took longer than 0\.2 s"):
        await hanging
    assert process.pid is None


async def test_a_cancelled_question_takes_its_process_along_and_no_other_question(make: Make) -> None:
    process = make()
    await process.ask(b"start")
    pid = process.pid
    tasks = [asyncio.create_task(process.ask(word)) for word in (b"hang", b"waiting", b"third")]
    await asyncio.sleep(0)  # all have asked
    tasks[1].cancel()  # it only waits: nothing happens to the process
    await asyncio.wait([tasks[1]])
    assert process.pid == pid
    tasks[0].cancel()
    assert await tasks[2] == "THIRD"
    assert tasks[0].cancelled()
    assert tasks[1].cancelled()
    assert not alive(pid or 0)


async def test_without_work_it_ends_and_starts_again(make: Make) -> None:
    process = make(idle=0)
    for _ in range(2):
        assert await process.ask(b"fine") == "FINE"
        await asyncio.to_thread(eventually, lambda: process.pid is None)


async def test_closing_ends_a_question_that_hangs(make: Make) -> None:
    process = make()
    await process.ask(b"start")
    hanging = asyncio.create_task(process.ask(b"hang"))
    await asyncio.sleep(0)
    await process.close()
    with pytest.raises(EngineUnavailable):
        await hanging


async def test_one_that_does_not_start_is_told(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineUnavailable):
        await make("broken").ask(b"fine")
    assert "ImportError: no models" in capfd.readouterr().err  # for the service's log


async def test_secrets_of_the_environment_stay_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "secret")
    assert await make().ask(b"secrets") == ""


PARENT = """
import asyncio
from deepseek_api_compat.media.recogniser_process import RecogniserProcess

async def main():
    process = RecogniserProcess("fakes.recogniser", "It", timeout=600, idle=600, memory=1 << 30)
    await process.ask(b"start")
    print("ready", flush=True)
    await process.ask(b"hang")

asyncio.run(main())
"""


def test_it_dies_with_a_parent_that_was_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment)
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        children = descendants(parent.pid)
        assert children
        parent.send_signal(signal.SIGKILL)
    eventually(lambda: not any(map(alive, children)))
