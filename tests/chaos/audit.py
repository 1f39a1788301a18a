"""What must be true when the load is gone and all is healed. Every check returns sentences: what is not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from chaos.exchange import Exchange
from chaos.fates import Fate
from chaos.setting import SLOTS, Setting, until
from fakes import ledger
from fakes.observe import descendants, idle, log_of, memory

GROWTH = 1.15  # of memory
PATIENCE = 30.0  # seconds in which all must be at rest
KINDS = ("gateway.worker", "template_process", "llamacpp_server", "engines.guard", "token_engine")
# Connections to engines are kept for the next request, as many as were in use at the same time.
KEPT = 5 * SLOTS + 8
Fates = Sequence[tuple[Exchange, Fate]]
SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "price")


class Rest(NamedTuple):
    """The service at rest.

    processes: how many of which kind. files: open ones that are no sockets, of the supervisor and then of
    each worker; sockets likewise. tasks: the most that a worker has.
    """

    processes: Counter[str]
    files: list[int]
    sockets: list[int]
    tasks: float


def at_rest(setting: Setting) -> Rest:
    """Look at it, once it is idle. Raises AssertionError if it does not come to rest."""
    until(lambda: idle(setting.service), PATIENCE, "all slots free and all queues empty")
    supervisor = setting.service.process.pid
    pids = [supervisor, *sorted(setting.service.workers())]
    tasks = [value for name, value in setting.metrics().items() if name.startswith("deepseek_worker_tasks")]
    return Rest(
        Counter(kind_of(pid) for pid in descendants(supervisor)),
        [sum(not name.startswith("socket:") for name in open_files(pid)) for pid in pids],
        [sum(name.startswith("socket:") for name in open_files(pid)) for pid in pids],
        max(tasks, default=0.0),
    )


def differences(before: Rest, now: Rest) -> list[str]:
    """What is at rest no more as it was."""
    found = []
    if before.processes != now.processes:
        found.append(f"processes: {dict(before.processes)} at first, {dict(now.processes)} now")
    # A worker is like any other: which of them was replaced by a new one is all the same.
    for what, old, new, more in (
        ("open files", before.files, now.files, 0),
        ("sockets", before.sockets, now.sockets, KEPT),
    ):
        if new[0] > old[0] + more or max(new[1:]) > max(old[1:]) + more:
            found.append(f"{what} of supervisor and workers: {old} at first, {new} now")
    if now.tasks > before.tasks:
        found.append(f"asyncio tasks of a worker: {before.tasks:g} at first, {now.tasks:g} now")
    return found


def rested(setting: Setting, before: Rest) -> list[str]:
    """The differences that are left after `PATIENCE`."""
    left: list[str] = []

    def same() -> bool:
        left[:] = [*differences(before, at_rest(setting)), *connections(setting)]
        return not left

    with suppress(AssertionError):
        until(same, PATIENCE, "")
    return left


def kind_of(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    if state == "Z":
        return "zombie"
    return next((kind for kind in KINDS if kind in line), line[:80])


def open_files(pid: int) -> list[str]:
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(entry.path))
    return found


def connections(setting: Setting) -> list[str]:
    """Connections of clients that are gone, which the service has not closed."""
    mine = {name for pid in setting.service.workers() for name in open_files(pid)}
    port = f":{setting.service.port:04X}"
    left = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(port) and fields[3] != "0A" and f"socket:[{fields[9]}]" in mine:
            left.append(line.strip())
    return [f"connections of clients that are gone: {left}"] if left else []


class MemoryWatch:
    """Resident memory of supervisor and workers, from `after` seconds of each one's life on."""

    def __init__(self, after: float) -> None:
        self._after = after
        self._seen: dict[int, float] = {}
        self.first: dict[int, int] = {}

    def look(self, pids: Iterable[int], now: float) -> None:
        for pid in pids:
            since = self._seen.setdefault(pid, now)
            if now - since >= self._after and pid not in self.first:
                with suppress(FileNotFoundError, ProcessLookupError):
                    self.first[pid] = memory(pid)

    def grown(self, pids: Iterable[int]) -> list[str]:
        found = []
        for pid in set(pids) & set(self.first):
            before, now = self.first[pid], memory(pid)
            print(f"memory of {pid}: {before / 2**20:.1f} MiB, at the end {now / 2**20:.1f} MiB")
            if now > before * GROWTH:
                found.append(f"process {pid} grew from {before / 2**20:.1f} to {now / 2**20:.1f} MiB")
        return found


def tracebacks(setting: Setting) -> list[str]:
    parts = log_of(setting.service).split("Traceback")
    return [f"a traceback in the log: {part[:3000]}" for part in parts[1:]][:3]


# The ledger


def books(setting: Setting, fates: Fates) -> list[str]:
    """What the ledger says of each request against what its client saw."""
    try:
        setting.service.command("ledger", "verify")
    except Exception as error:
        return [f"ledger verify: {error}"]
    known = {found.id: (found, fate) for found, fate in fates if found.id}
    rows: dict[str, ledger.Row] = {}

    def all_there() -> bool:
        rows.update(ledger.rows(setting.service))
        return all(id in rows for id, (_, fate) in known.items() if fate.kind == "answered" or fate.seen)

    with suppress(AssertionError):
        until(all_there, PATIENCE, "")
    found = [
        f"{problem}: {fate}, {exchange.ask}, row {rows.get(id)}"
        for id, (exchange, fate) in known.items()
        if (problem := _row_problem(fate, rows.get(id)))
    ]
    strangers = [row for id, row in rows.items() if id not in known]
    nameless = sum(exchange.id is None for exchange, _ in fates)
    if len(strangers) > nameless:
        found.append(f"{len(strangers)} rows of no request that was made, e.g. {strangers[:2]}")
    return found + _sums(setting, rows) + _metrics(setting.metrics(), rows)


OUTCOMES: Mapping[str, frozenset[str]] = {
    "answered": frozenset({"ok"}),
    "failed": frozenset({"engine_lost", "error"}),
    "left": frozenset({"cancelled_by_client", "ok", "engine_lost", "error", "gateway_lost"}),
    "broken": frozenset({"gateway_lost"}),
}


def _row_problem(fate: Fate, row: ledger.Row | None) -> str:
    if fate.kind in ("wrong", "refused"):
        return "a refused request has a row" if fate.kind == "refused" and row else ""
    if row is None:
        # One that never came to an engine may have none.
        return "no row" if fate.kind == "answered" or fate.seen else ""
    if row["outcome"] not in OUTCOMES[fate.kind]:
        return f"outcome {row['outcome']} of a request that was {fate.kind}"
    if fate.kind == "answered":
        for name, told in (("prompt_tokens", fate.prompt), ("completion_tokens", fate.completion)):
            if told is not None and row[name] != told:
                return f"{name} {row[name]}, the client was told {told}"
    return ""


def _sums(setting: Setting, rows: Mapping[str, ledger.Row]) -> list[str]:
    """The sums by key, and by hour, are those of the rows."""
    wanted = {name: sum(row[name] for row in rows.values()) for name in SUMS[1:]}
    wanted["requests"] = len(rows)
    found = []
    with ledger.database(setting.service.data_dir) as database:
        for table in ("totals", "usage"):
            columns = ", ".join(f"SUM({name}) AS {name}" for name in SUMS)
            sums = dict(database.execute(f"SELECT {columns} FROM {table}").fetchone())
            if sums != wanted:
                found.append(f"the table {table} adds up to {sums}, the rows to {wanted}")
    return found


def _metrics(metrics: Mapping[str, float], rows: Mapping[str, ledger.Row]) -> list[str]:
    """Tokens counted are those of the rows, but for those of killed workers: only the ledger knows them."""
    found = []
    for model in ("fake", "real", "relay"):
        counted = metrics.get(f'deepseek_tokens_total{{kind="completion",model="{model}"}}', 0)
        settled = sum(
            row["completion_tokens"]
            for row in rows.values()
            if row["model"] == model and row["outcome"] != "gateway_lost"
        )
        if counted != settled:
            found.append(f"{counted:g} completion tokens of {model} in the metrics, {settled} in the ledger")
    return found
