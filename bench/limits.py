"""What limits cost and how exact they are, with several processes at one key.

    python -m bench.limits [--seconds 60] [--workers 4] [--overload 10]

First the microseconds of each call, in one process. Then the processes together offer `overload` times what
the key may have, from a cold start: `admitted / limit` must be between 0.99 and 1 (or differ by one request).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from deepseek_api_compat.config import LimitSettings, ModelLimitSettings, ModelSettings
from deepseek_api_compat.errors import ApiError
from deepseek_api_compat.gateway.local_limits import LocalLimiter
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store.base import KeyLimits

Result = TypeVar("Result")
MODELS = [
    ModelSettings(name="limited", limits=ModelLimitSettings(tokens_per_minute=10**9, concurrency=10**6)),
    ModelSettings(name="free"),
]
NONE = LimitSettings(requests_per_second=0)


def key(slot: int, budget: int | None = None, **limits: Any) -> Principal:
    return Principal(
        id=f"key{slot}", name="", role="user", index=slot, limits=KeyLimits(**limits), budget=budget
    )


def at_once(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that never waits, as those of local limits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    raise AssertionError("it waited")


def limiter_of(memory: SharedMemory, worker: int, workers: int) -> LocalLimiter:
    return LocalLimiter(memory, 0, NONE, MODELS, workers=workers, worker=worker)


def microseconds(call: Callable[[], object], times: int = 50_000) -> float:
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times * 1e6


def costs() -> None:
    memory = SharedMemory.create(LocalLimiter.cells_for(len(MODELS), 1))
    limiter = limiter_of(memory, 0, 1)
    plain = key(1, rps=1e6)
    all_on = key(2, 10**15, rps=1e6, rpm=10**9, tpm=10**9, tpd=10**12, concurrency=10**6)
    refused = key(3, rps=1e-3)

    def request(principal: Principal, model: int, tokens: int, money: int) -> None:
        grant = at_once(limiter.admit_request(principal))
        at_once(grant.reserve(model, tokens, money))
        grant.settle(tokens, money)

    def refusal() -> None:
        try:
            at_once(limiter.admit_request(refused))
        except ApiError:
            return
        grants.append(None)

    grants: list[None] = []
    for name, call in {
        "admit, requests per second only": lambda: at_once(limiter.admit_request(plain)),
        "admit, reserve, settle; requests per second only, nothing used": lambda: request(plain, 1, 0, 0),
        "admit, reserve, settle; requests per second only": lambda: request(plain, 1, 100, 100),
        "admit, reserve, settle; every limit of the key": lambda: request(all_on, 1, 100, 100),
        "admit, reserve, settle; every limit, the model's too": lambda: request(all_on, 0, 100, 100),
        "refusal": refusal,
    }.items():
        print(f"{microseconds(call):8.2f} us  {name}")
    memory.close()


def flood(fd: int, worker: int, workers: int, offered: float, until: float, principal: Principal) -> int:
    """Offer so many requests a second; the number that was admitted."""
    limiter = limiter_of(SharedMemory(fd, LocalLimiter.cells_for(len(MODELS), workers)), worker, workers)
    admitted = 0
    began = time.monotonic()
    sent = 0
    while (now := time.monotonic()) < until:
        if sent > (now - began) * offered:
            time.sleep(1 / offered)
            continue
        sent += 1
        try:
            grant = at_once(limiter.admit_request(principal))
            at_once(grant.reserve(1, 1, 0))
        except ApiError:
            continue
        admitted += 1
        grant.settle(1, 0)
    return admitted


def exactness(workers: int, seconds: float, overload: float) -> None:
    """All cases at once, each in processes of its own."""
    cases = {
        "100 requests per second": (key(1, rps=100), 100.0),
        "0.5 requests per second": (key(2, rps=0.5), 0.5),
        "600 requests per minute": (key(3, rpm=600), 10.0),
        "6000 tokens per minute": (key(4, tpm=6000), 100.0),
    }
    processes = workers * len(cases)
    memory = SharedMemory.create(LocalLimiter.cells_for(len(MODELS), processes))
    fork = multiprocessing.get_context("fork")
    until = time.monotonic() + seconds
    jobs = []
    for position, (principal, rate) in enumerate(cases.values()):
        for worker in range(workers):
            number = position * workers + worker
            jobs.append((memory.fd, number, processes, rate * overload / workers, until, principal))
    with fork.Pool(processes) as pool:
        admitted = pool.starmap(flood, jobs, chunksize=1)
    for position, (name, (principal, rate)) in enumerate(cases.items()):
        got = sum(admitted[position * workers : (position + 1) * workers])
        per_minute = principal.limits.rpm or principal.limits.tpm
        # A minute's limit may come at once, so it is what any run of up to a minute may have.
        limit = per_minute * -(-seconds // 60) if per_minute else rate * seconds
        print(f"{name}: {got} admitted / {limit:g} = {got / limit:.4f}")
    memory.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--overload", type=float, default=10)
    args = parser.parse_args()
    costs()
    exactness(args.workers, args.seconds, args.overload)


if __name__ == "__main__":
    main()
