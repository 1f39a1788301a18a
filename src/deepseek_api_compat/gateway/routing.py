"""Which replica a prompt goes to: four policies behind one protocol.

A policy is told what is known of each replica (`Candidate`) and of the prompt (`Prompt`), and names those
that may be given it now, the best first. No clock, no I/O: ages are told, and chance comes from a seed, so
that the gateway and the simulator (`bench/routing`) run the same code. docs/routing.md compares the policies.

`PrefixCost`, the default, is LMetric's score (arXiv 2603.15202, section 5, "P-token x BS"): the prefill
tokens that a replica would have to compute if it got the prompt - those of the prompt that it does not hold,
and those of prompts it has not prefilled yet - times its batch size, running and queued, this prompt
included. The smallest product wins. There is nothing to tune: a factor on either number would change all
products alike. From the paper are the two numbers and their product. Not from it: weights, slow start, caps,
the sampling of large fleets, and that a prompt costs at least one token, as no engine answers without
computing the last one (otherwise a prompt that is held as a whole would cost nothing however busy the replica
is).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from random import Random
from typing import NamedTuple, Protocol

from deepseek_api_compat.gateway.prefix import PrefixIndex, chain

# Up to so many replicas all are looked at. Of more, a sample, and those that hold most of the prompt.
SCAN = 64
SAMPLE = 16
SLOW_START = 30.0  # seconds
LEAST_SHARE = 0.1  # of a replica that has just come up
# A replica may have so many times its part of all requests before consistent hashing passes it over.
BOUND = 1.25
RING_POINTS = 65_536


@dataclass(slots=True)
class Candidate:
    """What is known of one replica.

    running, queued: requests that it works at, and that wait at it.
    slots: how many it may have of both; 0 for any number.
    pending: prompt tokens sent to it, and not held by it, of requests that have no first token yet.
    weight: its share beside the others', at the same load; 0 for none.
    age: seconds since it became ready, or ready again.
    """

    replica: int
    running: int = 0
    queued: int = 0
    slots: int = 0
    pending: int = 0
    weight: float = 1.0
    age: float = math.inf
    healthy: bool = True


class Prompt(NamedTuple):
    """What routing knows of a prompt.

    hashes: of its blocks (`prefix.chain`), for the index that the policy has.
    affinity: what consistent hashing keeps together.
    """

    tokens: int
    hashes: Sequence[int]
    affinity: int

    @classmethod
    def of(cls, ids: Sequence[int], block: int, *, salt: bytes = b"", session: bytes = b"") -> Prompt:
        """`session` is who asks (a conversation, a key); without it prompts go by their first block."""
        hashes = chain(ids, block, salt)
        if session or not hashes:
            return cls(len(ids), hashes, _point(session or repr(ids).encode()))
        return cls(len(ids), hashes, hashes[0])


class Policy(Protocol):
    """One for each model. It may keep count of its own decisions; everything else it is told."""

    def order(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        """The replicas that may be given the prompt now, the best first; `replicas[i]` is replica i.

        Empty if none may. Of more than SCAN replicas not all that may are named.
        """
        ...

    def homes(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        """Which healthy replicas are worth waiting for when none may be given the prompt now, the best first.

        Empty if any will do.
        """
        ...


class Shares:
    """Who gets how much: a replica's weight, less while it is new."""

    def __init__(self, slow_start: float = SLOW_START) -> None:
        """A replica's share, and how many requests it may have, grow evenly over `slow_start` seconds."""
        self._slow_start = slow_start

    def of(self, candidate: Candidate) -> float:
        """0 if the replica may not be given a request now."""
        if not candidate.healthy:
            return 0.0
        slots = candidate.slots
        if candidate.age >= self._slow_start:
            busy = slots and candidate.running + candidate.queued >= slots
            return 0.0 if busy else candidate.weight
        ramp = max(LEAST_SHARE, candidate.age / self._slow_start)
        busy = slots and candidate.running + candidate.queued >= math.ceil(slots * ramp)
        return 0.0 if busy else candidate.weight * ramp


class RoundRobin:
    """Each in turn, as often as its share says, whatever it holds and however busy it is.

    By stride scheduling: a turn takes a replica 1 / share of virtual time, and who is the least far is next.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._far: dict[int, float] = {}
        self._now = 0.0
        self._turn = -1

    def order(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        self._turn += 1
        ranked: list[tuple[float, int, int, float]] = []
        for place, candidate in enumerate(_window(replicas, self._turn)):
            if share := self._shares.of(candidate):
                replica = candidate.replica
                # Who was away makes up for nothing.
                ranked.append((max(self._now, self._far.get(replica, 0.0)), place, replica, share))
        ranked.sort()
        if ranked:
            self._now, _, first, share = ranked[0]
            self._far[first] = self._now + 1.0 / share
        return [replica for _, _, replica, _ in ranked]

    def homes(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        return []


class LeastLoad:
    """The fewest requests for its share, whatever it holds."""

    def __init__(self, shares: Shares, seed: int = 0) -> None:
        self._shares = shares
        self._random = Random(seed)  # noqa: S311 - no secret
        self._turn = -1

    def order(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        self._turn += 1
        ranked: list[tuple[float, int, int, int]] = []
        for candidate in _sample(replicas, self._random):
            if share := self._shares.of(candidate):
                load = (candidate.running + candidate.queued + 1) / share
                turn = (candidate.replica - self._turn) % len(replicas)
                ranked.append((load, candidate.pending, turn, candidate.replica))
        ranked.sort()
        return [entry[3] for entry in ranked]

    def homes(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        return []


class PrefixCost:
    """The fewest tokens to compute, times the batch they are computed beside: see above.

    Among equals that with the smaller batch, then each in turn.
    """

    def __init__(self, index: PrefixIndex, shares: Shares, seed: int = 0) -> None:
        self._index = index
        self._shares = shares
        self._random = Random(seed)  # noqa: S311 - no secret
        self._turn = -1

    def order(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        self._turn += 1
        count, tokens, hashes = len(replicas), prompt.tokens, prompt.hashes
        held = self._index.held
        ranked: list[tuple[float, int, int, int]] = []
        for candidate in self._considered(hashes, replicas):
            if share := self._shares.of(candidate):
                replica = candidate.replica
                compute = max(1, tokens - held(replica, hashes)) + candidate.pending
                batch = candidate.running + candidate.queued + 1
                ranked.append((compute * batch / share, batch, (replica - self._turn) % count, replica))
        ranked.sort()
        return [entry[3] for entry in ranked]

    def homes(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        held = {
            replica: self._index.held(replica, prompt.hashes)
            for replica in self._index.best(prompt.hashes, SAMPLE)
            if replica < len(replicas) and replicas[replica].healthy
        }
        return sorted((replica for replica in held if held[replica]), key=lambda replica: -held[replica])

    def _considered(self, hashes: Sequence[int], replicas: Sequence[Candidate]) -> Iterable[Candidate]:
        if len(replicas) <= SCAN:
            return replicas
        sample = {candidate.replica: candidate for candidate in _sample(replicas, self._random)}
        holders = self._index.best(hashes, SAMPLE, self._turn)
        sample.update((replica, replicas[replica]) for replica in holders if replica < len(replicas))
        return sample.values()


class ConsistentHash:
    """The same replica for the same affinity, unless that has more than BOUND times its part of all load.

    After "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup, Zadimoghaddam; arXiv 1608.01350).
    """

    def __init__(self, shares: Shares, seed: int = 0) -> None:
        self._shares = shares
        self._random = Random(seed)  # noqa: S311 - no secret
        self._points: list[int] = []
        self._owners: list[int] = []

    def order(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        unit = self._load_per_share(replicas)
        below: list[int] = []
        above: list[int] = []
        for replica in self._around(prompt.affinity, len(replicas)):
            candidate = replicas[replica]
            if share := self._shares.of(candidate):
                bounded = candidate.running + candidate.queued < math.ceil(BOUND * unit * share)
                (below if bounded else above).append(replica)
                if len(below) >= SAMPLE and len(replicas) > SCAN:
                    break
        return (below + above)[:SCAN]

    def homes(self, prompt: Prompt, replicas: Sequence[Candidate]) -> list[int]:
        healthy = (n for n in self._around(prompt.affinity, len(replicas)) if replicas[n].healthy)
        return list(islice(healthy, 1))

    def _load_per_share(self, replicas: Sequence[Candidate]) -> float:
        """Requests for each unit of share, if all had the same; this prompt included."""
        load, shares, count = 0, 0.0, 0
        for candidate in _sample(replicas, self._random, SCAN):
            load += candidate.running + candidate.queued
            shares += self._shares.of(candidate)
            count += 1
        return (load + count / max(1, len(replicas))) / shares if shares else 0.0

    def _around(self, affinity: int, count: int) -> Iterator[int]:
        """Every replica once, in the order of the ring from that point on."""
        if len(self._owners) != count * _points_each(count):
            self._lay_out(count)
        start = bisect(self._points, affinity)
        seen: set[int] = set()
        for place in range(start, start + len(self._owners)):
            owner = self._owners[place % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner
            if len(seen) == count:
                return

    def _lay_out(self, count: int) -> None:
        """Only the replicas' numbers decide, so that all workers have the same ring, and keep it."""
        each = _points_each(count)
        ring = sorted((_point(b"%d/%d" % (owner, n)), owner) for owner in range(count) for n in range(each))
        self._points = [point for point, _ in ring]
        self._owners = [owner for _, owner in ring]


def _points_each(count: int) -> int:
    return max(8, min(128, RING_POINTS // max(1, count)))


def _point(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def _window(replicas: Sequence[Candidate], turn: int) -> Iterator[Candidate]:
    """At most SCAN of them, from the one whose turn it is."""
    count = len(replicas)
    return (replicas[(turn + place) % count] for place in range(min(SCAN, count)))


def _sample(replicas: Sequence[Candidate], random: Random, size: int = SAMPLE) -> Iterable[Candidate]:
    """All of a small fleet, `size` of a large one, or a few less."""
    count = len(replicas)
    if count <= SCAN:
        return replicas
    return [replicas[number] for number in {int(random.random() * count) for _ in range(size)}]


POLICIES: dict[str, Callable[[PrefixIndex, Shares, int], Policy]] = {
    "prefix": PrefixCost,
    "least-load": lambda index, shares, seed: LeastLoad(shares, seed),
    "round-robin": lambda index, shares, seed: RoundRobin(shares),
    "consistent-hash": lambda index, shares, seed: ConsistentHash(shares, seed),
}


def policy(name: str, index: PrefixIndex, *, slow_start: float = SLOW_START, seed: int = 0) -> Policy:
    """The policy of that name, one of POLICIES; `seed` decides which of a large fleet are looked at."""
    return POLICIES[name](index, Shares(slow_start), seed)
