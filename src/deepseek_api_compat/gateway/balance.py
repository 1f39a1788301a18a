"""What one worker knows of the replicas of a model, and what that says about where a prompt goes.

The policies are in `routing`, what replicas hold in `prefix`; here both get the gateway's facts. Load is that
of all workers (the slot table's); prompts on their way are those of this worker alone. What replicas hold is
what their engines tell (`tell`), else what this worker has sent them, corrected by the `cached_tokens` that
they report. These also test what is told: an engine that keeps finding more than it told of is not believed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from deepseek_api_compat.config import ModelSettings
from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.engines.kv_events import KVEvent
from deepseek_api_compat.gateway.prefix import PrefixIndex, chain
from deepseek_api_compat.gateway.routing import Candidate, Prompt, policy

Load = Sequence[tuple[int, int]]  # of each replica: slots in use, slots in all
# Answers in a row in which an engine found more than it had told of. One may be ahead of its event.
MOST_UNTOLD = 8
logger = logging.getLogger("deepseek_api")


class Balance:
    """One model's. `clock` tells seconds."""

    def __init__(self, settings: ModelSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._index = PrefixIndex()
        self._name = settings.name
        self._untold: Counter[int] = Counter()
        self._disbelieved: set[int] = set()
        self._policy = policy(settings.routing, self._index, slow_start=settings.slow_start)
        self._weights = [engine.weight for engine in settings.engines for _ in range(engine.replicas)]
        self._pending = [0] * len(self._weights)
        self._ready_since: dict[int, float] = {}
        self._pids: dict[int, int | None] = {}
        self._first = True
        self._clock = clock

    def update(self, states: Sequence[EngineState]) -> None:
        """The supervisor's view of all replicas: which are new, and what they can hold."""
        for state in states:
            replica = state.replica
            if state.state != "ready":
                self._ready_since.pop(replica, None)
            elif replica not in self._ready_since:
                # When the service starts all are new alike: there is nothing to spare them from.
                self._ready_since[replica] = -1e9 if self._first else self._clock()
                if self._pids.get(replica) != state.pid:
                    self._pids[replica] = state.pid
                    self.begin(replica)
                if state.info is not None:
                    self._index.resize(replica, state.info.context * max(1, state.info.slots))
        self._first = self._first and not self._ready_since

    def prompt(self, ids: Sequence[int], salt: str) -> Prompt:
        """What routing needs of a prompt; prompts of different salts share nothing."""
        return Prompt.of(ids, self._index.block, salt=salt.encode())

    def order(self, prompt: Prompt, load: Load) -> tuple[list[int], int]:
        """The replicas with a slot for the prompt, the best first; if there is none, its home (-1: any)."""
        now = self._clock()
        candidates = [
            Candidate(
                replica,
                running=used,
                slots=slots,
                pending=self._pending[replica],
                weight=self._weights[replica],
                age=now - self._ready_since.get(replica, now),
                healthy=slots > 0,
            )
            for replica, (used, slots) in enumerate(load)
        ]
        order = self._policy.order(prompt, candidates)
        homes = [] if order else self._policy.homes(prompt, candidates)
        return order, homes[0] if homes else -1

    def begin(self, replica: int) -> None:
        """The replica is new, or has told with a gap: from here on it is estimated, until it tells anew."""
        self._index.forget(replica)
        self._untold.pop(replica, None)
        self._disbelieved.discard(replica)

    def tell(self, replica: int, events: Iterable[KVEvent]) -> None:
        """What the engine says of its cache: all since it was empty, in order, or `begin` anew."""
        if replica not in self._disbelieved:
            for event in events:
                self._index.apply(replica, event)

    def told(self, replica: int) -> bool:
        """Whether what the replica holds is known from its engine."""
        return self._index.told(replica)

    def send(self, replica: int, prompt: Prompt) -> Visit:
        """The prompt goes to the replica now."""
        tokens = max(1, prompt.tokens - self._index.held(replica, prompt.hashes))
        self._index.expect(replica, prompt.hashes)
        self._pending[replica] += tokens
        return Visit(self, replica, prompt, tokens)

    def computed(self, replica: int, prompt: Prompt, tokens: int) -> None:
        """The prompt that was sent has its first token, or was given up; `tokens` were to be computed."""
        self._pending[replica] -= tokens
        self._index.settle(replica, prompt.hashes)

    def ended(self, replica: int, prompt: Prompt, ids: Sequence[int], salt: str, cached: int) -> None:
        """The engine has found `cached` tokens of the prompt, and holds prompt and answer, `ids`."""
        if self._index.told(replica):
            self._check(replica, prompt, cached)
        else:
            self._index.correct(replica, prompt.hashes, cached)
            self._index.insert(replica, chain(ids, self._index.block, salt.encode()))

    def _check(self, replica: int, prompt: Prompt, cached: int) -> None:
        """Whether it had told of what it found: such blocks can't have been evicted, for they were in use."""
        block = self._index.block
        if self._index.held(replica, prompt.hashes) >= cached // block * block:
            self._untold.pop(replica, None)
            return
        self._untold[replica] += 1
        if self._untold[replica] >= MOST_UNTOLD:
            logger.warning(
                "%s %d: its KV events leave out what it finds in its cache; estimates instead.",
                self._name,
                replica,
            )
            self.begin(replica)
            self._disbelieved.add(replica)


class Visit:
    """One prompt at one replica: `begun` with its first token, `ended` if it comes to that. `close` it."""

    __slots__ = ("_balance", "_open", "_prompt", "_replica", "_tokens")

    def __init__(self, balance: Balance, replica: int, prompt: Prompt, tokens: int) -> None:
        self._balance = balance
        self._replica = replica
        self._prompt = prompt
        self._tokens = tokens  # to be computed, as far as known
        self._open = True

    def close(self) -> None:
        """It is computed, or given up."""
        if self._open:
            self._open = False
            self._balance.computed(self._replica, self._prompt, self._tokens)

    begun = close

    def ended(self, ids: Sequence[int], salt: str, cached: int) -> None:
        """The engine holds prompt and answer, `ids`, and found `cached` tokens of them in its cache."""
        self._balance.ended(self._replica, self._prompt, ids, salt, cached)
