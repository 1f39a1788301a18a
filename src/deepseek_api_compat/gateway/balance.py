"""What one worker knows of the replicas of a model, and what that says about where a prompt goes.

The policies are in `routing`, what replicas hold in `prefix`; here both get the gateway's facts. Load is that
of all workers (the slot table's); prefixes, and prompts on their way, are those of this worker alone. What
it thinks that replicas hold is corrected by the `cached_tokens` that they report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from deepseek_api_compat.config import ModelSettings
from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.gateway.prefix import PrefixIndex, chain
from deepseek_api_compat.gateway.routing import Candidate, Prompt, policy

Load = Sequence[tuple[int, int]]  # of each replica: slots in use, slots in all


class Balance:
    """One model's. `clock` tells seconds."""

    def __init__(self, settings: ModelSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._index = PrefixIndex()
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
                    self._index.forget(replica)
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

    def send(self, replica: int, prompt: Prompt) -> Visit:
        """The prompt goes to the replica now."""
        tokens = max(1, prompt.tokens - self._index.held(replica, prompt.hashes))
        self._index.insert(replica, prompt.hashes)
        return Visit(self._index, self._pending, replica, prompt, tokens)


class Visit:
    """One prompt at one replica: `begun` with its first token, `ended` if it comes to that. `close` it."""

    __slots__ = ("_index", "_pending", "_prompt", "_replica", "_tokens")

    def __init__(
        self, index: PrefixIndex, pending: list[int], replica: int, prompt: Prompt, tokens: int
    ) -> None:
        self._index = index
        self._pending = pending
        self._replica = replica
        self._prompt = prompt
        self._tokens = tokens  # still to be computed, as far as known
        pending[replica] += tokens

    def close(self) -> None:
        """It is computed, or given up."""
        self._pending[self._replica] -= self._tokens
        self._tokens = 0

    begun = close

    def ended(self, ids: Sequence[int], salt: str, cached: int) -> None:
        """The engine holds prompt and answer, `ids`, and found `cached` tokens of them in its cache."""
        self._index.correct(self._replica, self._prompt.hashes, cached)
        self._index.insert(self._replica, chain(ids, self._index.block, salt.encode()))
