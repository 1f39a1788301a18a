"""What engines tell decides where a prompt goes, as long as they live and it is borne out."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deepseek_api_compat.config import EngineSettings, ModelSettings
from deepseek_api_compat.engines.base import Endpoint, EngineState, ModelInfo
from deepseek_api_compat.engines.kv_events import BlocksStored, Cleared, KVSource
from deepseek_api_compat.gateway.balance import MOST_UNTOLD, Balance
from deepseek_api_compat.gateway.kv_feeds import Feeds
from fakes.kv_publisher import Publisher

IDS = list(range(256))
LOAD = [(0, 4), (0, 4)]
STORED = ["BlockStored", [1], None, IDS, 256, None]
INFO = ModelInfo(context=1000, slots=4)


def a_balance() -> Balance:
    engine = EngineSettings(kind="vllm", path="m", replicas=2)
    return Balance(ModelSettings(name="m", engines=[engine], slow_start=0.0))


def states(source: KVSource | None, *, state: str = "ready", pid: int = 1) -> list[EngineState]:
    """The first is replica 0, which tells nothing."""
    return [
        EngineState("m", 0, "vllm", "ready", Endpoint(), 99, info=INFO),
        EngineState("m", 1, "vllm", state, Endpoint(), pid, info=INFO, kv=source),
    ]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 30 s")


def to_compute(balance: Balance) -> int:
    """How many tokens of IDS replica 1 does not have."""
    visit = balance.send(1, balance.prompt(IDS, ""))
    visit.close()
    return visit._tokens


def answered(balance: Balance, replica: int, cached: int = 0) -> None:
    """A prompt goes there and is answered."""
    visit = balance.send(replica, balance.prompt(IDS, ""))
    visit.begun()
    visit.ended(IDS, "", cached)


class Gateway:
    """A worker's view of two replicas."""

    def __init__(self) -> None:
        self.balance = a_balance()
        self.feeds = Feeds(self.balance)

    def update(self, states: list[EngineState]) -> None:
        self.balance.update(states)
        self.feeds.update(states)

    def home(self) -> int | None:
        """Where a prompt that begins with IDS goes; None where all are alike."""
        firsts = {self.balance.order(self.balance.prompt([*IDS, turn], ""), LOAD)[0][0] for turn in range(8)}
        return firsts.pop() if len(firsts) == 1 else None


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    yield gateway
    await gateway.feeds.close()


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    folder = Path(tempfile.mkdtemp(prefix="kv-"))
    publisher = Publisher(folder)
    yield publisher
    await publisher.die()
    shutil.rmtree(folder)


async def test_a_prompt_goes_where_an_engine_says_that_it_has_it(
    gateway: Gateway, publisher: Publisher
) -> None:
    gateway.update(states(publisher.source))
    assert gateway.home() is None
    await publisher.subscribed()
    await publisher.publish(STORED)
    await eventually(lambda: gateway.home() == 1)
    await publisher.publish(["BlockRemoved", [1]])
    await eventually(lambda: gateway.home() is None)


async def test_what_was_sent_to_an_engine_that_tells_counts_while_it_computes(
    gateway: Gateway, publisher: Publisher
) -> None:
    gateway.update(states(publisher.source))
    await eventually(lambda: gateway.balance.told(1))
    visit = gateway.balance.send(1, gateway.balance.prompt(IDS, ""))
    assert to_compute(gateway.balance) == 1
    visit.begun()
    assert to_compute(gateway.balance) == 256
    visit.ended(IDS, "", 0)
    visit.close()
    assert gateway.home() is None  # it has not told of it
    answered(gateway.balance, 0)
    assert gateway.home() == 0


@pytest.mark.parametrize("state", ["starting", "failed", "stopping"])
async def test_a_dead_engine_holds_nothing(gateway: Gateway, publisher: Publisher, state: str) -> None:
    await publisher.publish(STORED)
    gateway.update(states(publisher.source))
    await eventually(lambda: gateway.home() == 1)
    gateway.update(states(publisher.source, state=state))
    assert not gateway.balance.told(1)
    assert gateway.home() is None


async def test_an_engine_in_doubt_or_out_of_service_is_still_listened_to(
    gateway: Gateway, publisher: Publisher
) -> None:
    gateway.update(states(publisher.source))
    await publisher.subscribed()
    for state in ("doubtful", "drained", "ready"):
        gateway.update(states(publisher.source, state=state))
    await publisher.publish(STORED)
    await eventually(lambda: gateway.home() == 1)
    assert publisher.asked == [0]


async def test_a_new_engine_is_heard_from_its_beginning(gateway: Gateway, publisher: Publisher) -> None:
    gateway.update(states(publisher.source))
    await publisher.publish(STORED)
    await eventually(lambda: gateway.home() == 1)
    gateway.update(states(publisher.source, pid=2))
    assert gateway.home() is None
    await eventually(lambda: gateway.home() == 1)
    assert publisher.asked == [0, 0]


async def test_an_engine_that_does_not_tell_is_estimated(gateway: Gateway) -> None:
    gateway.update(states(None))
    answered(gateway.balance, 1)
    assert gateway.home() == 1
    assert not gateway.balance.told(1)


async def test_when_it_ends_nobody_listens(gateway: Gateway, publisher: Publisher) -> None:
    before = asyncio.all_tasks()
    gateway.update(states(publisher.source))
    await publisher.subscribed()
    await gateway.feeds.close()
    assert asyncio.all_tasks() <= before


def test_an_engine_that_leaves_out_what_it_finds_is_not_believed() -> None:
    balance = a_balance()
    balance.update(states(None))
    balance.tell(1, [Cleared()])
    for _ in range(MOST_UNTOLD - 1):
        answered(balance, 1, cached=255)
    answered(balance, 1)  # this one is borne out
    for _ in range(MOST_UNTOLD - 1):
        answered(balance, 1, cached=255)
    assert balance.told(1)
    answered(balance, 1, cached=255)
    balance.tell(1, [BlocksStored([7], None, [7] * 64, 64)])
    assert not balance.told(1)
    answered(balance, 1, cached=255)
    assert to_compute(balance) == 1  # it is estimated
    balance.begin(1)
    balance.tell(1, [Cleared()])
    assert balance.told(1)
