"""Replicas that take time, and the requests of a trace sent to them by a policy.

A replica works in steps, as engines with chunked prefill do: each makes one token of every answer that has
begun, and up to `chunk` tokens of the oldest prompt that is not computed yet. A step takes

    step + batch_step x answers that have begun + prompt tokens in it / prefill

seconds. Time is continuous: between two events a replica's rates are constant. Its KV cache keeps the prompts
it has computed, block by block, the least recently used first to go.

A request takes the first replica of the policy's order. If no replica may be given it, it waits in one queue
for all, and what was sent to a replica that dies goes back to the head of that. A replica that becomes free
takes the first of the queue ("fifo"), or the first of the WINDOW first ones that would rather be there than
anywhere else ("home"), the first of all if there is none or if that was passed over too often.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from bench.routing.trace import BLOCK, Request
from deepseek_api_compat.gateway.prefix import BlockCache, PrefixIndex
from deepseek_api_compat.gateway.routing import Candidate, Policy

WINDOW = 64
PASSED_OVER = 256


@dataclass(frozen=True)
class Machine:
    """What a replica can do. prefill: prompt tokens/s when nothing else runs; step, batch_step: seconds.

    The defaults are round figures for an 8-GPU node, chosen, not measured.
    """

    slots: int = 64
    prefill: float = 8000.0
    step: float = 0.02
    batch_step: float = 0.0003
    chunk: int = 2048
    cache: int = 500_000


@dataclass(slots=True)
class Work:
    """A request at a replica, sent there at `sent`.

    believed, computed: prompt tokens to compute, as the gateway thought and as it was.
    rest: of them those still to compute. due: the replica's token count at which the answer ends.
    """

    request: Request
    sent: float
    believed: int
    computed: int
    rest: float
    due: float = math.inf


@dataclass(slots=True)
class Waiting:
    """A request that found no replica; `home` is where it would rather be, -1 for anywhere."""

    request: Request
    home: int = -1
    passed_over: int = 0


@dataclass
class Outcome:
    """What came of a run.

    first_token: seconds from each request to its first token, in the order of these.
    sent: requests sent to each replica. busy: the sum of the seconds that these took there.
    seconds: when the last answer ended. resent: requests whose replica died, and which began anew.
    """

    sent: list[int]
    busy: list[float]
    first_token: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ended: int = 0
    seconds: float = 0.0
    resent: int = 0


class Replica:
    """One engine. `tell` is what the gateway knows of it; the rest is its own business."""

    def __init__(self, number: int, machine: Machine) -> None:
        self.tell = Candidate(number, slots=machine.slots)
        self.since = 0.0  # when it came back last
        self.version = 0  # of what is planned for it: older plans are void
        self._machine = machine
        self._cache = BlockCache(max(1, machine.cache // BLOCK))
        self._prefills: deque[Work] = deque()
        self._answers: list[tuple[float, int, Work]] = []
        self._serial = 0
        self._now = 0.0
        self._tokens = 0.0  # that every answer has made since the start

    def start(self, request: Request, believed: int, now: float) -> Work:
        self._advance(now)
        prompt = request.prompt
        # The last token is always computed: an answer can't begin without it.
        cached = min(self._cache.longest(prompt.hashes) * BLOCK, prompt.tokens - 1)
        self._cache.use(prompt.hashes)
        computed = prompt.tokens - cached
        work = Work(request, now, believed, computed, computed)
        self._prefills.append(work)
        return work

    def next_event(self) -> float:
        """When the oldest prompt is computed or an answer ends, if nothing is sent to it meanwhile."""
        prefill, token = self._rates()
        times = [math.inf]
        if self._prefills:
            times.append(self._now + self._prefills[0].rest / prefill)
        if self._answers:
            times.append(self._now + (self._answers[0][0] - self._tokens) / token)
        return min(times)

    def happen(self, now: float) -> tuple[list[Work], list[Work]]:
        """Go on to that event. Returns the work whose first token is there, and what has ended."""
        self._advance(now)
        begun, ended = [], []
        # A millionth of a token: what rounding may leave.
        while self._prefills and self._prefills[0].rest <= 1e-6:
            work = self._prefills.popleft()
            work.due = self._tokens + work.request.output - 1
            self._serial += 1
            heapq.heappush(self._answers, (work.due, self._serial, work))
            begun.append(work)
        while self._answers and self._answers[0][0] - self._tokens <= 1e-6:
            ended.append(heapq.heappop(self._answers)[2])
        return begun, ended

    def die(self) -> list[Work]:
        """Lose everything; returns what was under way."""
        lost = [*self._prefills, *(work for _, _, work in self._answers)]
        self._prefills.clear()
        self._answers.clear()
        self._cache = BlockCache(self._cache.most)
        self.version += 1
        return lost

    def _rates(self) -> tuple[float, float]:
        """Tokens a second, of the oldest prompt and of every answer."""
        machine = self._machine
        step = machine.step + machine.batch_step * len(self._answers)
        if not self._prefills:
            return 0.0, 1.0 / step
        step += machine.chunk / machine.prefill
        return machine.chunk / step, 1.0 / step

    def _advance(self, now: float) -> None:
        prefill, token = self._rates()
        passed = now - self._now
        if self._prefills:
            self._prefills[0].rest -= prefill * passed
        self._tokens += token * passed
        self._now = now


class Event(IntEnum):
    """In the order in which events of the same time happen."""

    REPLICA, DOWN, UP = range(3)


@dataclass(frozen=True)
class Fault:
    """A replica that is gone from `at` until `until`."""

    replica: int
    at: float
    until: float


class Simulation:
    """One run of one policy. Nothing is random in it but what the policy does."""

    def __init__(
        self,
        requests: Sequence[Request],
        count: int,
        policy: Policy,
        index: PrefixIndex,
        *,
        machine: Machine | None = None,
        faults: Sequence[Fault] = (),
        home: bool = True,
    ) -> None:
        """`index` has blocks of BLOCK tokens and learns as the gateway's does; a policy may look at it."""
        machine = machine or Machine()
        self._requests = requests
        self._policy = policy
        self._index = index
        self._replicas = [Replica(number, machine) for number in range(count)]
        self._fleet = [replica.tell for replica in self._replicas]
        self._outcome = Outcome(sent=[0] * count, busy=[0.0] * count)
        self._home = home
        self._waiting: deque[Waiting] = deque()
        self._begun: set[int] = set()
        self._recovered: list[Replica] = []
        self._events: list[tuple[float, Event, int, int]] = []
        for fault in faults:
            heapq.heappush(self._events, (fault.at, Event.DOWN, fault.replica, 0))
            heapq.heappush(self._events, (fault.until, Event.UP, fault.replica, 0))

    def run(self) -> Outcome:
        """To the end of the last answer."""
        for request in self._requests:
            while self._events and self._events[0][0] <= request.at:
                self._happen(*heapq.heappop(self._events))
            self._arrive(request)
        while self._events:
            self._happen(*heapq.heappop(self._events))
        return self._outcome

    def _happen(self, now: float, event: Event, number: int, version: int) -> None:
        replica = self._replicas[number]
        if event is Event.DOWN:
            self._die(replica)
        elif event is Event.UP:
            replica.tell.healthy = True
            replica.since = now
            self._recovered.append(replica)
        elif version == replica.version:
            self._go_on(replica, now)
            self._outcome.seconds = now
        self._dispatch(now)

    def _arrive(self, request: Request) -> None:
        self._age(request.at)
        order = [] if self._waiting else self._policy.order(request.prompt, self._fleet)
        if order:
            self._send(request, self._replicas[order[0]], request.at)
            return
        homes = self._policy.homes(request.prompt, self._fleet) if self._home else []
        self._waiting.append(Waiting(request, homes[0] if homes else -1))

    def _dispatch(self, now: float) -> None:
        """Send what waits, as long as a replica may be given the oldest."""
        while self._waiting:
            self._age(now)
            order = self._policy.order(self._waiting[0].request.prompt, self._fleet)
            if not order:
                return
            place, replica = self._at_home(set(order)) or (0, order[0])
            waiting = self._waiting[place]
            del self._waiting[place]
            self._send(waiting.request, self._replicas[replica], now)

    def _at_home(self, free: set[int]) -> tuple[int, int] | None:
        """The first in the queue whose home is free, and that; None for the first of all."""
        if self._waiting[0].passed_over >= PASSED_OVER:
            return None
        for place, waiting in enumerate(islice(self._waiting, WINDOW)):
            if waiting.home in free:
                self._waiting[0].passed_over += 1
                return place, waiting.home
        return None

    def _age(self, now: float) -> None:
        for replica in self._recovered:
            replica.tell.age = now - replica.since

    def _send(self, request: Request, replica: Replica, now: float) -> None:
        tell, prompt = replica.tell, request.prompt
        believed = prompt.tokens - self._index.held(tell.replica, prompt.hashes)
        self._index.insert(tell.replica, prompt.hashes)
        tell.running += 1
        tell.pending += believed
        work = replica.start(request, believed, now)
        self._outcome.sent[tell.replica] += 1
        self._outcome.prompt_tokens += prompt.tokens
        self._outcome.cached_tokens += prompt.tokens - work.computed
        self._plan(replica)

    def _go_on(self, replica: Replica, now: float) -> None:
        begun, ended = replica.happen(now)
        for work in begun:
            replica.tell.pending -= work.believed
            if id(work.request) not in self._begun:
                self._begun.add(id(work.request))
                self._outcome.first_token.append(now - work.request.at)
        for work in ended:
            self._end(replica, work, now)
        self._plan(replica)

    def _end(self, replica: Replica, work: Work, now: float) -> None:
        tell, prompt = replica.tell, work.request.prompt
        tell.running -= 1
        self._index.correct(tell.replica, prompt.hashes, prompt.tokens - work.computed)
        self._index.insert(tell.replica, prompt.hashes)
        self._outcome.busy[tell.replica] += now - work.sent
        self._outcome.ended += 1

    def _die(self, replica: Replica) -> None:
        lost = replica.die()
        self._index.forget(replica.tell.replica)
        replica.tell.healthy = False
        replica.tell.running = replica.tell.pending = 0
        self._outcome.resent += len(lost)
        lost.sort(key=lambda work: work.request.at)
        self._waiting.extendleft(Waiting(work.request) for work in reversed(lost))

    def _plan(self, replica: Replica) -> None:
        replica.version += 1
        at = replica.next_event()
        if at < math.inf:
            heapq.heappush(self._events, (at, Event.REPLICA, replica.tell.replica, replica.version))
