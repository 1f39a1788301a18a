"""Requests to route: from a file in the format of Mooncake's traces, or made up.

A line of such a file is a JSON object (github.com/kvcache-ai/Mooncake, in FAST25-release/traces):

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

with the time in milliseconds, lengths in tokens, and one id for each 512 tokens of the prompt, of which the
last may be fewer. Equal ids mean equal tokens, and equal tokens before them.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from deepseek_api_compat.gateway.routing import Prompt

BLOCK = 512


class Request(NamedTuple):
    """`at` in seconds; `output` in tokens."""

    at: float
    prompt: Prompt
    output: int


def read(path: Path, speed: float = 1.0) -> list[Request]:
    """The file's requests, `speed` times as fast. Raises ValueError at a line that isn't one."""
    with path.open(encoding="utf-8") as lines:
        requests = [_request(line, number, speed) for number, line in enumerate(lines, 1) if line.strip()]
    requests.sort(key=lambda request: request.at)
    return requests


def _request(line: str, number: int, speed: float) -> Request:
    try:
        row = json.loads(line)
        tokens, ids = int(row["input_length"]), row["hash_ids"]
        prompt = Prompt(tokens, ids[: tokens // BLOCK], _affinity(ids))
        return Request(row["timestamp"] / 1000 / speed, prompt, max(1, int(row["output_length"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Line {number} is no request: {error!r}") from None


def _affinity(ids: list[int]) -> int:
    """The first block names a system prompt, which many share, the second mostly a conversation."""
    return hash(tuple(ids[:2])) % (1 << 64)


@dataclass(frozen=True)
class Mix:
    """Conversations to make up. Lengths in tokens, times in seconds; "about" means log-normally around that.

    rate: conversations that begin in a second.
    systems: different system prompts, the n-th of which is used in proportion to 1 / n ** zipf; each is
        `system` long, or less.
    turns: how many requests a conversation has, on average (geometrically).
    question, answer: about how long they are. Each prompt holds all before it.
    think: from an answer to the next question, on average (exponentially).
    """

    rate: float
    systems: int = 100
    zipf: float = 1.1
    system: int = 4096
    turns: float = 5.0
    question: int = 300
    answer: int = 250
    think: float = 30.0
    longest: int = 32_768


def made_up(mix: Mix, count: int, seed: int = 0) -> list[Request]:
    """`count` requests of conversations that begin at random, in order of time; the same for the same seed.

    They are asked at times that don't depend on when answers come, so every policy gets the same requests.
    """
    random = Random(seed)
    blocks = iter(range(1 << 62))
    lengths = [random.randrange(1, mix.system // BLOCK + 1) for _ in range(mix.systems)]
    systems = [[next(blocks) for _ in range(length)] for length in lengths]
    weights = [1 / (rank + 1) ** mix.zipf for rank in range(mix.systems)]
    requests: list[Request] = []
    # The next request of each conversation that goes on; the serial number decides between equal times.
    going: list[tuple[float, int, Request, Iterator[Request]]] = []
    begin, serial = random.expovariate(mix.rate), 0
    while len(requests) < count:
        if not going or begin < going[0][0]:
            system = random.choices(systems, weights)[0]
            conversation = _conversation(mix, begin, system, blocks, random)
            begin += random.expovariate(mix.rate)
        else:
            _, _, request, conversation = heapq.heappop(going)
            requests.append(request)
        if (following := next(conversation, None)) is not None:
            serial += 1
            heapq.heappush(going, (following.at, serial, following, conversation))
    return requests


def _conversation(
    mix: Mix, at: float, system: list[int], blocks: Iterator[int], random: Random
) -> Iterator[Request]:
    ids = list(system)
    tokens = len(system) * BLOCK
    affinity = random.getrandbits(64)
    while True:
        tokens += _about(mix.question, random)
        answer = _about(mix.answer, random)
        if tokens + answer > mix.longest:
            return
        ids += [next(blocks) for _ in range(tokens // BLOCK - len(ids))]
        yield Request(at, Prompt(tokens, tuple(ids), affinity), answer)
        if random.random() < 1 / mix.turns:
            return
        tokens += answer
        at += random.expovariate(1 / mix.think)


def _about(tokens: int, random: Random) -> int:
    return max(1, round(tokens * math.exp(random.gauss(0.0, 0.7))))
