"""A job finds a replica, and another one when that dies: on engines that die when the test says so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from deepseek_api_compat.config import EngineSettings, ModelSettings
from deepseek_api_compat.engines.base import Endpoint, EngineState, ModelInfo
from deepseek_api_compat.engines.upstream import Hung, Lost, Unanswered
from deepseek_api_compat.errors import (
    ApiError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    InvalidRequest,
)
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.slots import Leases, SlotTable, wake
from deepseek_api_compat.protocol.grammar import text
from deepseek_api_compat.protocol.job import Job, Piece

REPLICAS = 3
ANSWER = list(range(100, 120))
LOST = Lost("broke off")


class Engine:
    """Makes `ANSWER`, a token at a time; fails after as many of its own as `deaths` says, one life each."""

    def __init__(self, deaths: list[tuple[int, ApiError]]) -> None:
        self.jobs: list[Job] = []
        self._deaths = deaths

    async def stream(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        self.jobs.append(job)
        after, error = self._deaths.pop(0) if self._deaths else (len(ANSWER), None)
        rest = ANSWER[job.sent :]
        for id in rest[:after]:
            await asyncio.sleep(0)
            yield [Piece([id], f"<{id}>")]
        if error is not None:
            raise error
        yield [Piece(finish="stop", prompt_tokens=len(job.prompt_ids), completion_tokens=len(rest))]


class Pool(ModelPool):
    """A pool of such engines, all of which take their deaths from one list; and its supervisor."""

    def __init__(
        self, table: SlotTable, leases: Leases, deaths: list[tuple[int, ApiError]], wake_fd: int
    ) -> None:
        settings = ModelSettings(
            name="m",
            ready_timeout=0.5,
            engines=[EngineSettings(kind="llamacpp", path="m.gguf", replicas=REPLICAS)],
        )
        super().__init__(0, settings, leases, on_doubt=self.doubted)
        self.doubts: list[tuple[int, bool]] = []
        self.made = [Engine(deaths) for _ in range(REPLICAS)]
        self.table = table
        self.leases = leases
        self._wake_fd = wake_fd
        self.come_back = True
        self.say()

    def _engine(self, replica: int) -> Engine:  # type: ignore[override]
        return self.made[replica]

    async def stream(self, *args: Any) -> AsyncGenerator[list[Piece], None]:
        self.leases.start(asyncio.get_running_loop())
        async with aclosing(super().stream(*args)) as groups:
            async for group in groups:
                yield group

    def doubted(self, pool: int, replica: int, hung: bool) -> None:
        self.doubts.append((replica, hung))
        if self.come_back:
            asyncio.get_running_loop().call_later(0.02, self.say)

    def say(self) -> None:
        for replica in range(REPLICAS):
            wake([self._wake_fd], self.table.set_capacity(0, replica, 1))
        info = ModelInfo(context=1000, slots=1)
        self.update(
            [EngineState("m", r, "llamacpp", "ready", Endpoint(), info=info) for r in range(REPLICAS)]
        )


@pytest.fixture
def new_pool() -> Iterator[Callable[..., Pool]]:
    memory = SharedMemory.create(SlotTable.cells_for([REPLICAS], 1))
    read, write = os.pipe()

    def make(*deaths: tuple[int, ApiError]) -> Pool:
        table = SlotTable(memory, 0, [REPLICAS], 1)
        return Pool(table, Leases(table, 0, [write], read, max_queue=4), list(deaths), write)

    yield make
    os.close(read)
    os.close(write)
    memory.close()


def run(pool: Pool, job: Job | None = None) -> list[Piece]:
    async def all_of() -> list[Piece]:
        pieces: list[Piece] = []
        async with aclosing(pool.stream(job or Job([1, 2], max_tokens=50))) as stream:
            async for group in stream:
                pieces += group
        return pieces

    pieces = asyncio.run(all_of())
    assert pool.usage()[0] == 0, "a slot was kept"
    return pieces


def ids_of(pieces: list[Piece]) -> list[int]:
    return [id for piece in pieces for id in piece.ids]


@pytest.mark.parametrize("error", [LOST, Hung("silence"), Unanswered("closed"), EngineFailed("nonsense")])
@pytest.mark.parametrize("after", [0, 1, 19, 20])
def test_the_answer_goes_on(new_pool, error, after):
    pool = new_pool((after, error))
    pieces = run(pool)
    assert ids_of(pieces) == ANSWER
    assert (pieces[-1].finish, pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == ("stop", 2, 20)


def test_death_after_death(new_pool):
    assert ids_of(run(new_pool(*[(1, LOST)] * 19))) == ANSWER


def test_who_kills_every_engine_is_stopped(new_pool):
    for deaths, tokens, tried in (([(0, LOST)] * 9, 0, 3), ([(5, LOST)] + [(0, LOST)] * 9, 5, 3)):
        pool = new_pool(*deaths)
        seen: list[int] = []

        async def read(pool: Pool = pool, seen: list[int] = seen) -> None:
            async with aclosing(pool.stream(Job([1, 2], max_tokens=50))) as stream:
                async for group in stream:
                    seen += ids_of(group)

        with pytest.raises(EngineFailed):
            asyncio.run(read())
        assert seen == ANSWER[:tokens]
        assert sum(len(engine.jobs) for engine in pool.made) == tried


def test_a_doubtful_replica_gets_no_work_until_the_supervisor_has_spoken(new_pool):
    pool = new_pool((3, LOST), (3, Hung("silence")), (3, EngineTimeout("silence")))
    pool.come_back = False

    async def one(pool: Pool = pool) -> None:
        async with aclosing(pool.stream(Job([1, 2], max_tokens=50))) as stream:
            async for _ in stream:
                pass

    with pytest.raises(EngineUnavailable, match="No engine of m is ready"):
        asyncio.run(one())
    assert sorted(replica for replica, _ in pool.doubts) == [0, 1, 2]
    assert [hung for _, hung in pool.doubts] == [False, True, True]


def test_an_engine_that_says_why_it_failed_is_not_doubted(new_pool):
    pool = new_pool((3, EngineFailed("out of memory")))
    assert ids_of(run(pool)) == ANSWER
    assert pool.doubts == []


def test_what_is_the_request_s_own_fault_is_not_tried_again(new_pool):
    pool = new_pool((0, InvalidRequest("no")))
    with pytest.raises(InvalidRequest):
        run(pool)
    assert sum(len(engine.jobs) for engine in pool.made) == 1


def test_an_answer_under_a_grammar_goes_on_with_what_remains_of_it(new_pool):
    written = "".join(f"<{id}>" for id in ANSWER)
    pool = new_pool((3, LOST), (5, LOST))
    pieces = run(pool, Job([1, 2], max_tokens=50, grammar=text(written)))
    assert ids_of(pieces) == ANSWER
    jobs = sorted((job for engine in pool.made for job in engine.jobs), key=lambda job: job.sent)
    assert [job.grammar for job in jobs] == [text(written), text(written[15:]), text(written[40:])]


def test_a_grammar_whose_rest_can_t_be_told_ends_with_its_engine(new_pool):
    job = Job([1, 2], max_tokens=50, grammar=text("abc"))  # the engine does not keep to it
    assert ids_of(run(new_pool((0, LOST)), job)) == ANSWER
    with pytest.raises(Lost):
        run(new_pool((1, LOST)), job)


def test_an_engine_that_does_not_take_the_rest(new_pool):
    """It is no fault of the request, which an engine has taken."""
    with pytest.raises(Lost):
        run(new_pool((3, LOST), (0, InvalidRequest("no such grammar"))))


def test_only_the_last_piece_was_missing(new_pool):
    pieces = run(new_pool((20, LOST)), Job([1, 2], max_tokens=20))
    assert pieces[-1] == Piece(finish="length", prompt_tokens=2, completion_tokens=20)


def test_a_prompt_goes_where_its_beginning_was_computed(new_pool):
    pool = new_pool()
    first = list(range(1000, 1300))
    run(pool, Job(first, max_tokens=50))
    [home] = [engine for engine in pool.made if engine.jobs]
    for length in (300, 200, 640):
        run(pool, Job([*first[:length], *range(2000, 2000 + length - len(first[:length]))], max_tokens=50))
    assert len(home.jobs) == 4
    # What is salted shares nothing, and goes to whom has the least to do: each in turn.
    for _ in range(3):
        run(pool, Job(first, max_tokens=50, cache_salt="mine"))
    assert len(home.jobs) < 7


def test_the_answer_goes_on_where_its_prompt_was_computed(new_pool):
    pool = new_pool((20, LOST))
    first = list(range(1000, 1300))
    run(pool, Job(first, max_tokens=50))
    assert sorted(len(engine.jobs) for engine in pool.made) == [0, 1, 1], "another one finished it"
    survivor = next(engine for engine in pool.made if engine.jobs and engine.jobs[0].sent)
    run(pool, Job([*first, *ANSWER, *range(40)], max_tokens=50))
    assert len(survivor.jobs) == 2


def test_a_question_that_needs_no_slot_is_asked_again(new_pool):
    pool = new_pool()
    asked = []

    async def question(engine: Engine) -> str:
        asked.append(pool.made.index(engine))
        if len(asked) == 1:
            raise Unanswered("refused")
        if len(asked) == 2:
            raise EngineTimeout("silent")
        return "answer"

    assert asyncio.run(pool.ask(question)) == "answer"
    assert asked == [0, 1, 2]
    assert pool.doubts == [(0, False), (1, True)]


def test_a_question_that_is_wrong_or_kills_is_not_asked_for_ever(new_pool):
    pool = new_pool()

    async def question(error: ApiError) -> None:
        raise error

    with pytest.raises(InvalidRequest):
        asyncio.run(pool.ask(lambda engine: question(InvalidRequest("no"))))
    assert pool.doubts == []
    with pytest.raises(Lost):
        asyncio.run(pool.ask(lambda engine: question(LOST)))
    assert len(pool.doubts) == 3


def test_a_job_is_not_tried_where_it_has_failed(new_pool):
    pool = new_pool()
    first = list(range(1000, 1300))
    run(pool, Job(first, max_tokens=50))
    home = next(engine for engine in pool.made if engine.jobs)
    home._deaths = [(0, EngineFailed("no"))] * 9
    assert ids_of(run(pool, Job(first, max_tokens=50))) == ANSWER
    assert len(home.jobs) == 2


def test_one_that_answers_questions_and_gives_no_tokens_is_asked_for_one(new_pool):
    pool = new_pool()
    for engine in pool.made:
        engine._deaths = [(0, EngineFailed("no"))] * 9
    for _ in range(9):
        with pytest.raises(EngineFailed):
            run(pool)
        pool.say()  # what the loop that has ended would have done
    assert {hung for _, hung in pool.doubts} == {True}
    assert {replica for replica, _ in pool.doubts} == {0, 1, 2}


def test_a_drained_replica_keeps_what_can_t_go_on_elsewhere(new_pool):
    class Client:
        """An engine's client, closed or not."""

    pool = new_pool()
    pool._engines = {replica: Client() for replica in range(REPLICAS)}  # type: ignore[dict-item, misc]
    pool._bound[1] = 1
    states = [msgspec.structs.replace(state, state="drained") for state in pool.states]
    dropped = pool.update([states[0], states[1], pool.states[2]])
    assert len(dropped) == 1
    assert sorted(pool._engines) == [1, 2]


def test_an_answer_that_lost_its_engine_waits_in_front_of_the_queue(new_pool):
    pool = new_pool((3, LOST), (3, LOST), (3, LOST))
    pool.come_back = False
    order: list[str] = []

    async def one(name: str) -> None:
        async with aclosing(pool.stream(Job([1, 2], max_tokens=50))) as stream:
            async for _ in stream:
                order.append(name)

    async def all_of() -> None:
        begun = [asyncio.create_task(one(f"begun {n}")) for n in range(REPLICAS)]
        await asyncio.sleep(0.01)
        assert [name for name in order if name == "begun 2"] == ["begun 2"] * 3
        late = [asyncio.create_task(pool._leases.acquire(0)) for _ in range(1)]  # it queues already
        await asyncio.sleep(0.01)
        pool.say()
        await asyncio.gather(*begun)
        for lease in await asyncio.gather(*late):
            lease.release()

    asyncio.run(all_of())
    assert len(order) == REPLICAS * (len(ANSWER) + 1)


def test_no_slot_is_lost_when_it_waits_in_vain(new_pool):
    pool = new_pool((3, LOST), (3, LOST), (3, LOST))
    pool.come_back = False

    async def cancelled() -> None:
        async with aclosing(pool.stream(Job([1, 2], max_tokens=50))) as stream:
            async for _ in stream:
                pass

    async def leave() -> None:
        tasks = [asyncio.create_task(cancelled()) for _ in range(REPLICAS)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert pool.usage()[0] == pool.usage()[2] == 0
    pool.say()
    assert ids_of(run(pool)) == ANSWER
