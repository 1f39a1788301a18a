"""What the ledger costs: the worker's side in microseconds, the supervisor's in rows a second.

    python -m bench.ledger [--rows N] [--keys N] [--url postgresql+psycopg://...] [--quick]

The journal is written to a temporary directory (`TMPDIR` chooses the disk) and taken in as the supervisor
does it. A day's summary is then asked of a day with `--rows` requests. Microseconds are of CPU time.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from deepseek_api_compat.config import LedgerSettings
from deepseek_api_compat.gateway.journal import Journal
from deepseek_api_compat.gateway.ledger import Intake
from deepseek_api_compat.gateway.prices import Price
from deepseek_api_compat.store.ledger import Ledger
from deepseek_api_compat.store.ledger_rows import DAY, Filter

PRICE = Price(270_000, 70_000, 1_100_000)
CHUNKS = 20
DAY_BEGAN = time.time() // DAY * DAY - DAY
MODELS = ("deepseek-v3", "deepseek-r1", "smollm2-135m-instruct")


def microseconds(action: Callable[[int], None], times: int, rounds: int = 7) -> float:
    """Median of `rounds` means."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        action(times)
        found.append((time.process_time() - began) / times * 1e6)
    return median(found)


def journal_costs(directory: Path, times: int) -> None:
    journal = Journal(directory, 0, LedgerSettings(max_journal_bytes=2**40))
    ids = (f"req-0123456789ab{number:08x}" for number in range(10**8))
    started = int(DAY_BEGAN * 1000)

    def request(count: int, chunks: int = 0) -> None:
        for _, id in zip(range(count), ids, strict=False):
            entry = journal.admit(
                id, started, "abcdefghijkl", None, "/chat/completions", "deepseek-v3", PRICE
            )
            entry.dispatched(0, 1)
            entry.first_token(12)
            for number in range(chunks):
                entry.made(100, 50, number, 0)
                entry.sent(1)
            entry.made(100, 50, 200, 0)
            entry.settle("ok", 200, 321, finish="stop")

    def refused(count: int) -> None:
        for _ in range(count):
            journal.refused("abcdefghijkl", "rate_limit_exceeded")

    plain = microseconds(request, times)
    streamed = microseconds(lambda count: request(count, CHUNKS), times // 4)
    print(f"request, admitted to settled   {plain:7.2f} us")
    print(f"chunk of a stream, made + sent {(streamed - plain) / CHUNKS:7.2f} us")
    print(f"refusal                        {microseconds(refused, times):7.2f} us")
    journal.close()


def write_day(directory: Path, rows: int, keys: int) -> None:
    """A day's requests, spread evenly, in the journal of a worker that is gone."""
    journal = Journal(directory, 0, LedgerSettings(max_journal_bytes=2**40))
    names = [f"key{number:09d}" for number in range(keys)]
    for number in range(rows):
        entry = journal.admit(
            f"req-0123456789cd{number:08x}",
            int((DAY_BEGAN + number * DAY / rows) * 1000),
            random.choice(names),
            None,
            "/chat/completions",
            random.choice(MODELS),
            PRICE,
        )
        entry.dispatched(0, 1)
        entry.made(100, 50, 200, 0)
        entry.sent(200)
        entry.settle("error" if number % 50 == 0 else "ok", 200, 321, finish="stop")
    journal.close()


def intake_speed(intake: Intake, rows: int, keys: int) -> None:
    intake.take()  # makes the schema
    write_day(intake.directory, rows, keys)
    size = sum(path.stat().st_size for path in intake.directory.iterdir())
    began, busy = time.perf_counter(), time.process_time()
    taken = intake.take()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    if taken != rows:
        raise RuntimeError(f"{taken} rows were taken in, not {rows}")
    print(f"journal of {rows} requests      {size / rows:7.0f} bytes each")
    print(
        f"taken in                       {rows / seconds:7.0f} rows/s, {busy / rows * 1e6:.1f} us of CPU each"
    )


def summary_times(ledger: Ledger) -> None:
    day = Filter(since=DAY_BEGAN, until=DAY_BEGAN + DAY)
    for by in ((), ("hour",), ("key",), ("model", "hour"), ("key", "model", "hour")):
        began = time.perf_counter()
        found = ledger.summary(day, by)
        seconds = time.perf_counter() - began
        print(f"day's summary by {'+'.join(by) or 'nothing':14}{seconds:7.3f} s, {len(found)} lines")
    began = time.perf_counter()
    spent = ledger.spent(DAY_BEGAN + DAY - 1)
    print(f"what {len(spent)} keys have spent       {time.perf_counter() - began:7.3f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--url", help="an empty PostgreSQL database, instead of SQLite")
    parser.add_argument("--quick", action="store_true", help="few rows: shows that it runs")
    args = parser.parse_args()
    rows = 20_000 if args.quick else args.rows
    with TemporaryDirectory() as name:
        (Path(name) / "costs").mkdir()
        journal_costs(Path(name) / "costs", 2000 if args.quick else 20_000)
        intake = Intake(Path(name), LedgerSettings(database_url=args.url))
        intake_speed(intake, rows, args.keys)
        summary_times(intake.ledger())
        intake.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
