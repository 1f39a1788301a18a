"""Counters that Prometheus reads at `/metrics`, added up over all workers.

`prometheus_client` keeps memory-mapped files for each worker (`metric_files.py`) in the directory that the
supervisor names in PROMETHEUS_MULTIPROC_DIR, so counts survive a killed worker. docs/api.md has a line for
each metric.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from deepseek_api_compat.errors import ApiError
from deepseek_api_compat.gateway import metric_files
from deepseek_api_compat.gateway.pool import ModelPool

metric_files.use()

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_registry = CollectorRegistry()
REQUESTS = Counter(
    "deepseek_requests",
    "Requests by endpoint, model and HTTP status.",
    ["endpoint", "model", "status"],
    registry=_registry,
)
TOKENS = Counter(
    "deepseek_tokens",
    "Tokens by model and kind: prompt, cached, completion, reasoning.",
    ["model", "kind"],
    registry=_registry,
)
DURATION = Histogram(
    "deepseek_request_duration_seconds",
    "From the arrival of a request to the end of its answer.",
    ["endpoint", "model"],
    buckets=LATENCY_BUCKETS,
    registry=_registry,
)
TTFT = Histogram(
    "deepseek_time_to_first_token_seconds",
    "From the arrival of a request to the first token of its answer.",
    ["model"],
    buckets=LATENCY_BUCKETS,
    registry=_registry,
)
CLIENT_GONE = Counter(
    "deepseek_client_disconnects",
    "Requests whose client left before the end.",
    ["endpoint"],
    registry=_registry,
)
UNRECORDED = Counter(
    "deepseek_ledger_unrecorded",
    "Requests served without a row in the ledger, for there was no room to write them down.",
    registry=_registry,
)
REFUSED = Counter(
    "deepseek_refusals",
    "Requests refused before they reached a model, by code.",
    ["code"],
    registry=_registry,
)
REDIS_FAILURES = Counter(
    "deepseek_limits_redis_failures",
    "Calls to the Redis that counts limits which failed or took too long.",
    registry=_registry,
)
SETTLEMENTS_LOST = Counter(
    "deepseek_limits_settlements_lost",
    "Requests whose use the Redis that counts limits will never hear of.",
    registry=_registry,
)
PLUGIN_FAILURES = Counter(
    "deepseek_plugin_failures",
    "Calls of plugins' hooks that raised, took too long or returned what they may not.",
    ["plugin", "hook"],
    registry=_registry,
)
PLUGIN_SECONDS = Counter(
    "deepseek_plugin_seconds",
    "Time that requests waited for plugins; those called in the event loop are not timed.",
    ["plugin", "hook"],
    registry=_registry,
)
MEDIA = Counter(
    "deepseek_media",
    "Pictures and recordings by kind and what became of them: read, cached, native, refused, failed.",
    ["kind", "result"],
    registry=_registry,
)
PLUGIN_REPLIES = Counter(
    "deepseek_plugin_replies",
    "Requests that a plugin answered, for which no engine was asked.",
    ["plugin"],
    registry=_registry,
)
WORKER_TASKS = Gauge(
    "deepseek_worker_tasks",
    "asyncio tasks of a worker: one for each request at work and a few of its own.",
    ["worker"],
    registry=_registry,
    multiprocess_mode="mostrecent",  # of a killed worker and the one in its place, the latter's
)


class PoolCollector:
    """Gauges read from the pools at the moment of the scrape."""

    def __init__(self, pools: list[ModelPool]) -> None:
        self._pools = pools

    def collect(self) -> list[GaugeMetricFamily]:
        slots = GaugeMetricFamily("deepseek_slots", "Slots of a model, by state.", labels=["model", "state"])
        queue = GaugeMetricFamily("deepseek_queue_length", "Requests waiting for a slot.", labels=["model"])
        up = GaugeMetricFamily(
            "deepseek_engine_up", "1 while a replica can answer.", labels=["model", "replica", "kind"]
        )
        exact = GaugeMetricFamily(
            "deepseek_prefixes_exact",
            "1 while the engine tells what it holds in its KV cache; 0: it is estimated.",
            labels=["model", "replica"],
        )
        for pool in self._pools:
            if pool.leased:
                used, total, waiting = pool.usage()
                slots.add_metric([pool.name, "used"], used)
                slots.add_metric([pool.name, "all"], total)
                queue.add_metric([pool.name], waiting)
            for state in pool.states:
                up.add_metric([pool.name, str(state.replica), state.kind], float(state.state == "ready"))
                if state.kv is not None:
                    exact.add_metric([pool.name, str(state.replica)], float(pool.tells(state.replica)))
        return [slots, queue, up, exact]


class LedgerCollector:
    """Gauges of the ledger's intake."""

    def __init__(self, *, problem: bool, lag: float, pending: int, damaged: int) -> None:
        self._gauges = (
            ("deepseek_ledger_up", "1 while all requests get into the ledger.", float(not problem)),
            ("deepseek_ledger_lag_seconds", "Since when nothing could be taken in.", lag),
            ("deepseek_ledger_pending_bytes", "Journals that are not taken in yet.", float(pending)),
            ("deepseek_ledger_damaged", "Places in journals that could not be read.", float(damaged)),
        )

    def collect(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily(name, text, value=value) for name, text, value in self._gauges]


class LimitsCollector:
    """Whether limits that several machines share are counted by this one alone."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone

    def collect(self) -> list[GaugeMetricFamily]:
        text = "1 while the Redis that counts limits is away, and this machine counts them alone."
        return [GaugeMetricFamily("deepseek_limits_alone", text, value=float(self._alone))]


def exposition(pools: list[ModelPool], *gauges: LedgerCollector | LimitsCollector) -> bytes:
    """The Prometheus text format. Reads files: not for the event loop."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(PoolCollector(pools))
    for collector in gauges:
        registry.register(collector)
    return generate_latest(registry)


class Tally:
    """What one request used; `settle` records it exactly once, however the request ended."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "endpoint",
        "error",
        "finish",
        "first",
        "model",
        "prompt_tokens",
        "reasoning_tokens",
        "start",
        "status",
    )

    def __init__(self, endpoint: str, start: float) -> None:
        self.endpoint = endpoint
        self.model = ""
        self.start = start
        self.first = 0.0
        self.status = 0
        self.error: ApiError | None = None
        self.finish: str | None = None  # of the first choice
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.reasoning_tokens = 0

    def settle(self, now: float) -> None:
        key = (self.endpoint, self.model, self.status)
        children = _known.get(key)
        if children is None:
            children = _known[key] = _Children(*key)
        children.requests.add(1.0)
        children.duration.observe(now - self.start)
        if self.first:
            children.ttft.observe(self.first - self.start)
        if self.prompt_tokens:
            children.prompt.add(self.prompt_tokens)
        if self.cached_tokens:
            children.cached.add(self.cached_tokens)
        if self.completion_tokens:
            children.completion.add(self.completion_tokens)
        if self.reasoning_tokens:
            children.reasoning.add(self.reasoning_tokens)


class _Number:
    """A number of prometheus_client's, added to where it lies in its file.

    Its own `inc` takes a lock, asks for the process id and looks the place up, each time; a worker adds from
    its event loop alone and never forks. What is added is in the file at once all the same.
    """

    __slots__ = ("_at", "_cells")

    def __init__(self, value: Any) -> None:
        """`value` is a MmapedValue. Another, of a process without such files, counts for nobody."""
        file = getattr(value, "_file", None)
        # When the file grows, what was mapped of it stays so.
        self._cells = memoryview(bytearray(8) if file is None else file._m).cast("d")
        self._at = 0 if file is None else file._positions[value._key] // 8

    def add(self, amount: float) -> None:
        self._cells[self._at] += amount


class _Spread:
    """A histogram, added to as `_Number` says."""

    __slots__ = ("_buckets", "_sum")

    def __init__(self, histogram: Any) -> None:
        self._sum = _Number(histogram._sum)
        self._buckets = [_Number(bucket) for bucket in histogram._buckets]

    def observe(self, seconds: float) -> None:
        self._sum.add(seconds)
        self._buckets[bisect_left(LATENCY_BUCKETS, seconds)].add(1.0)


class _Children:
    """The metrics of one endpoint, model and status, looked up once: `labels()` costs microseconds.

    Those of a model are made at its first use, so that refused requests leave no series without a name.
    """

    def __init__(self, endpoint: str, model: str, status: int) -> None:
        self._model = model
        self.requests = _number(REQUESTS, endpoint, model, str(status))
        self.duration = _spread(DURATION, endpoint, model)

    @cached_property
    def ttft(self) -> _Spread:
        return _spread(TTFT, self._model)

    @cached_property
    def prompt(self) -> _Number:
        return _number(TOKENS, self._model, "prompt")

    @cached_property
    def cached(self) -> _Number:
        return _number(TOKENS, self._model, "cached")

    @cached_property
    def completion(self) -> _Number:
        return _number(TOKENS, self._model, "completion")

    @cached_property
    def reasoning(self) -> _Number:
        return _number(TOKENS, self._model, "reasoning")


def _number(counter: Counter, *labels: str) -> _Number:
    return _Number(counter.labels(*labels)._value)


def _spread(histogram: Histogram, *labels: str) -> _Spread:
    return _Spread(histogram.labels(*labels))


_known: dict[tuple[str, str, int], _Children] = {}
