"""A reader of KV events over real ZeroMQ: it has heard everything, or it says that it has not."""

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest

from deepseek_api_compat.engines import kv_reader
from deepseek_api_compat.engines.kv_events import BlocksRemoved, BlocksStored, Cleared
from deepseek_api_compat.engines.kv_reader import KVReader
from fakes.kv_publisher import Publisher

LOST = "lost"


def stored(name, parent=None):
    return ["BlockStored", [name], parent, [name], 1]


def told(name, parent=None):
    return BlocksStored([name], parent, [name], 1)


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="kv-"))  # not tmp_path: a socket's path must be short
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def publish(folder):
    """Starts publishers, one in the place of the other."""
    started: list[Publisher] = []

    async def start(**options):
        for publisher in started:
            await publisher.die()
        started.append(Publisher(folder, **options))
        return started[-1]

    yield start
    for publisher in started:
        await publisher.die()


@contextlib.asynccontextmanager
async def reading(source):
    """A reader at work, and what it says, in order."""
    heard: asyncio.Queue = asyncio.Queue()

    def tell(events):
        for event in events:
            heard.put_nowait(event)

    reader = KVReader(source, tell, lambda: heard.put_nowait(LOST))
    task = asyncio.ensure_future(reader.run())

    async def say(count):
        return [await asyncio.wait_for(heard.get(), 30) for _ in range(count)]

    try:
        yield reader, say
        assert heard.empty()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("topics", [True, False])
async def test_what_was_before_and_what_comes(publish, topics):
    publisher = await publish(topics=topics)
    await publisher.publish(stored(1), stored(2, 1))
    await publisher.publish(stored(3, 2))
    async with reading(publisher.source) as (_, say):
        assert await say(4) == [Cleared(), told(1), told(2, 1), told(3, 2)]
        await publisher.subscribed()
        await publisher.publish(["BlockRemoved", [3]])
        await publisher.publish(["AllBlocksCleared"])
        assert await say(2) == [BlocksRemoved([3]), Cleared()]
    assert publisher.asked == [0]


async def test_an_engine_that_has_published_nothing_holds_nothing(publish):
    publisher = await publish()
    async with reading(publisher.source) as (_, say):
        assert await say(1) == [Cleared()]


async def test_it_may_be_there_before_the_engine(publish):
    absent = await publish()
    await absent.die()
    async with reading(absent.source) as (_, say):
        await asyncio.sleep(0.05)  # for its first attempt, of which nobody hears
        publisher = await publish()
        await publisher.publish(stored(1))
        assert await say(2) == [Cleared(), told(1)]


async def test_what_was_missed_is_asked_for(publish):
    publisher = await publish()
    async with reading(publisher.source) as (_, say):
        await say(1)
        await publisher.subscribed()
        await publisher.publish(stored(1))
        await publisher.publish(stored(2, 1), lost=True)
        await publisher.publish(stored(3, 2), lost=True)
        await publisher.publish(stored(4, 3))
        await publisher.publish(stored(5, 4))
        assert await say(5) == [told(1), *(told(name, name - 1) for name in (2, 3, 4, 5))]
    assert publisher.asked == [0, 1]


async def test_what_can_not_be_repeated_is_lost_until_the_cache_is_empty(publish):
    publisher = await publish(keeps=1)
    async with reading(publisher.source) as (_, say):
        await say(1)
        await publisher.subscribed()
        await publisher.publish(stored(1))
        await publisher.publish(stored(2, 1), lost=True)
        await publisher.publish(stored(3, 2))
        await publisher.publish(stored(4, 3))
        assert await say(2) == [told(1), LOST]
        await publisher.publish(stored(5), ["AllBlocksCleared"], stored(6))
        await publisher.publish(stored(7, 6))
        assert await say(3) == [Cleared(), told(6), told(7, 6)]


async def test_who_comes_late_says_nothing_of_a_cache_that_it_does_not_know(publish):
    publisher = await publish(keeps=2)
    for name in range(5):
        await publisher.publish(stored(name))
    async with reading(publisher.source) as (_, say):
        await publisher.subscribed()
        await publisher.publish(stored(9))
        await publisher.publish(["AllBlocksCleared"], stored(1))
        assert await say(2) == [Cleared(), told(1)]


async def test_without_a_replay_it_waits_for_an_empty_cache(publish):
    publisher = await publish(replays=False)
    await publisher.publish(stored(1))
    async with reading(publisher.source) as (_, say):
        await publisher.subscribed()
        await publisher.publish(stored(2, 1))
        await publisher.publish(["AllBlocksCleared"])
        await publisher.publish(stored(3))
        assert await say(2) == [Cleared(), told(3)]
        await publisher.publish(stored(4), lost=True)
        await publisher.publish(stored(5))
        assert await say(1) == [LOST]


async def test_without_a_replay_the_first_batch_is_a_beginning(publish):
    publisher = await publish(replays=False)
    async with reading(publisher.source) as (_, say):
        await publisher.subscribed()
        await publisher.publish(stored(1))
        assert await say(2) == [Cleared(), told(1)]


async def test_a_restarted_engine_holds_what_it_says_and_nothing_else(publish):
    first = await publish()
    async with reading(first.source) as (_, say):
        await say(1)
        await first.subscribed()
        for name in range(3):
            await first.publish(stored(name))
        assert await say(3) == [told(name) for name in range(3)]
        await first.die()
        assert await say(1) == [LOST]
        # It is further than the other was: by the numbers alone this could be the same engine.
        second = await publish()
        for name in range(10, 15):
            await second.publish(stored(name))
        assert await say(6) == [Cleared(), *(told(name) for name in range(10, 15))]


async def test_garbage_is_dropped_and_counted(publish):
    publisher = await publish()
    async with reading(publisher.source) as (reader, say):
        await say(1)
        await publisher.subscribed()
        await publisher.raw(b"")
        await publisher.raw(b"kv", b"short", b"payload")
        await publisher.raw(b"kv", (7).to_bytes(8, "big"), b"\xc1", b"more")
        await publisher.publish(stored(1))
        assert await say(1) == [told(1)]
        assert reader.dropped == 3
        await publisher.raw(b"kv", (2**64 - 1).to_bytes(8, "big"), b"\xc1")  # a number that never comes
        for name in (2, 3):
            await publisher.publish(stored(name))
            assert await say(1) == [told(name)]
        assert reader.dropped == 4


async def test_a_batch_that_can_not_be_read_is_a_gap(publish):
    publisher = await publish()
    async with reading(publisher.source) as (reader, say):
        await say(1)
        await publisher.subscribed()
        await publisher.send(b"\xc1")
        await publisher.publish(stored(1))
        await publisher.publish(["AllBlocksCleared"])
        assert await say(2) == [LOST, Cleared()]
        assert reader.dropped == 1


async def test_a_publisher_that_does_not_answer_is_asked_again(publish, monkeypatch):
    monkeypatch.setattr(kv_reader, "REPLAY_TIMEOUT", 0.05)
    publisher = await publish()
    publisher._answering.cancel()
    async with reading(publisher.source) as (_, say):
        await publisher.subscribed()
        await publisher.publish(stored(1))
        publisher._answering = asyncio.ensure_future(publisher._answer())
        assert await say(2) == [Cleared(), told(1)]


async def test_what_goes_wrong_in_a_listener_is_no_end(publish, caplog):
    publisher = await publish()
    heard: asyncio.Queue = asyncio.Queue()
    problems = [RuntimeError("not now")]

    def tell(events):
        if problems:
            raise problems.pop()
        heard.put_nowait(events)

    task = asyncio.ensure_future(KVReader(publisher.source, tell, lambda: None).run())
    assert await asyncio.wait_for(heard.get(), 30) == [Cleared()]
    assert "not now" in caplog.text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
