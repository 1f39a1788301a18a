"""`deepseek-api ledger`: sum up, export and check what every request cost.

It reads the ledger's database itself, whether a service runs or not. Times are `7d`, `12h` or `30m` (so long
ago), or a date with or without a time, in UTC unless it names an offset.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from deepseek_api_compat.errors import SetupError

if TYPE_CHECKING:
    from deepseek_api_compat.config import Settings
    from deepseek_api_compat.store.ledger import Ledger
    from deepseek_api_compat.store.ledger_rows import Filter, LedgerRow, Usage

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

FORMATS = ("csv", "jsonl", "parquet")
GROUPS = ("key", "model", "hour", "day")
UNITS = {"d": 86400, "h": 3600, "m": 60}
CHUNK = 10_000  # rows of a Parquet row group


def add_parser(subparsers: SubParsers) -> None:
    """Add `ledger` and its commands; each sets `run`: parsed arguments in, exit code out."""
    parser = subparsers.add_parser("ledger", help="sum up, export and check requests", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    summary = _command(commands, "summary", _summary, "sum up requests, tokens and prices")
    summary.add_argument("--by", choices=GROUPS, action="append", default=[], help="may be given repeatedly")
    summary.add_argument("--json", action="store_true", help="print a JSON array; prices in micro-units")
    _add_filter(summary)

    export = _command(commands, "export", _export, "write rows to a file")
    export.add_argument("file", metavar="FILE", help="where to; its ending says how; -: standard output")
    export.add_argument("--format", choices=FORMATS, help="default: as the file's ending, or csv")
    _add_filter(export)

    _command(commands, "verify", _verify, "compare rows with sums; exit code 1 if anything is wrong")


def _command(commands: SubParsers, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--data-dir", metavar="DIR", help="the service's data directory")
    parser.add_argument("--config", metavar="FILE", help="the service's configuration file")
    parser.set_defaults(run=run)
    return parser


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", metavar="TIME", type=_moment, help="from then on")
    parser.add_argument("--until", metavar="TIME", type=_moment, help="before then")
    parser.add_argument("--key", metavar="ID", help="of one key")
    parser.add_argument("--model", metavar="NAME", help="of one model")
    parser.add_argument("--outcome", metavar="NAME", help="with one outcome, such as gateway_lost")


def _moment(text: str) -> float:
    """A point in time as unix seconds."""
    ago = re.fullmatch(r"(\d+)([dhm])", text)
    if ago:
        return time.time() - int(ago[1]) * UNITS[ago[2]]
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 knows no Z
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 7d, 12h, 30m, 2026-11-01, ...") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _filter(args: argparse.Namespace) -> Filter:
    from deepseek_api_compat.store.ledger_rows import Filter

    return Filter(since=args.since, until=args.until, key_id=args.key, model=args.model, outcome=args.outcome)


def _settings(args: argparse.Namespace) -> Settings:
    from deepseek_api_compat import config

    return config.load(args.config, flags={"server": {"data_dir": args.data_dir}})


@contextmanager
def _opened(settings: Settings) -> Iterator[Ledger]:
    # Imported here: SQLAlchemy is slower than the rest of `--help`.
    from deepseek_api_compat.store.ledger import DATABASE, open_ledger

    if not settings.ledger.database_url and not (settings.data_dir / DATABASE).exists():
        raise SetupError(f"There is no ledger in {settings.data_dir}: no service has started there yet.")
    ledger = open_ledger(settings.data_dir, settings.ledger.database_url)
    try:
        yield ledger
    finally:
        ledger.close()


# Summary


def _summary(args: argparse.Namespace) -> int:
    if {"hour", "day"} <= set(args.by):
        raise SetupError("Choose --by hour or --by day, not both.")
    settings = _settings(args)
    with _opened(settings) as ledger:
        found = ledger.summary(_filter(args), args.by)
    if args.json:
        print(json.dumps([{name: getattr(one, name) for name in one.__struct_fields__} for one in found]))
    else:
        _print_table(found, args.by, settings.ledger.currency)
    return 0


def _print_table(found: Iterable[Usage], by: list[str], currency: str) -> None:
    heads = [name.upper() for name in GROUPS if name in by]
    counts = ["REQUESTS", "NOT OK", "PROMPT", "CACHED", "COMPLETION", "REASONING", currency]
    table = [heads + counts]
    for one in found:
        groups = [_group(one, name) for name in GROUPS if name in by]
        failed = one.requests - one.outcomes.get("ok", 0)
        tokens = (one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.reasoning_tokens)
        table.append([*groups, *map(str, (one.requests, failed, *tokens)), _money(one.price)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(width) if number < len(heads) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _group(one: Usage, name: str) -> str:
    if name in ("hour", "day"):
        form = "%Y-%m-%d %H:%M" if name == "hour" else "%Y-%m-%d"
        return datetime.fromtimestamp(one.start or 0, timezone.utc).strftime(form)
    return (one.key_id if name == "key" else one.model) or ""


def _money(micro: int) -> str:
    return f"{Decimal(micro) / 1_000_000:.6f}"


# Export


def _export(args: argparse.Namespace) -> int:
    ending = Path(args.file).suffix.removeprefix(".")
    form = args.format or (ending if ending in FORMATS else "csv")
    write = {"csv": _write_csv, "jsonl": _write_jsonl, "parquet": _write_parquet}[form]
    with _opened(_settings(args)) as ledger, _output(args.file) as file:
        write(ledger.rows(_filter(args)), file)
    return 0


@contextmanager
def _output(name: str) -> Iterator[IO[bytes]]:
    """Standard output, or a file that gets its name when it is complete."""
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    partial = Path(name + ".part")
    try:
        # Who asked for what, and when: for the operator only, as the database is.
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            yield file
        partial.replace(name)
    except OSError as error:
        raise SetupError(f"Can't write {name}: {(error.strerror or str(error)).lower()}.") from None
    finally:
        partial.unlink(missing_ok=True)


def _write_csv(rows: Iterable[LedgerRow], file: IO[bytes]) -> None:
    import io

    from deepseek_api_compat.store.ledger_rows import LedgerRow

    text = io.TextIOWrapper(file, "utf-8", newline="")
    try:
        writer = csv.writer(text)
        names = LedgerRow.__struct_fields__
        writer.writerow(names)
        writer.writerows([_harmless(getattr(row, name)) for name in names] for row in rows)
    finally:
        text.detach()


def _harmless(value: object) -> object:
    """A spreadsheet would run a text that begins like a formula."""
    return "'" + value if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _write_jsonl(rows: Iterable[LedgerRow], file: IO[bytes]) -> None:
    import msgspec

    for row in rows:
        file.write(msgspec.json.encode(msgspec.structs.asdict(row)) + b"\n")


def _write_parquet(rows: Iterable[LedgerRow], file: IO[bytes]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise SetupError(
            "Parquet needs the package pyarrow: pip install 'deepseek-api-compat[parquet]'."
        ) from None
    from itertools import islice

    from deepseek_api_compat.store.ledger_rows import LedgerRow

    numbers = {
        "started", "replica", "status", "queue_ms", "ttft_ms", "total_ms", "prompt_tokens", "cached_tokens",
        "completion_tokens", "reasoning_tokens", "sent_tokens", "price",
    }  # fmt: skip
    names = LedgerRow.__struct_fields__
    schema = pyarrow.schema(
        [(name, pyarrow.int64() if name in numbers else pyarrow.string()) for name in names]
    )
    source = iter(rows)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while chunk := list(islice(source, CHUNK)):
            columns = [pyarrow.array([getattr(row, one.name) for row in chunk], one.type) for one in schema]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


# Verify


def _verify(args: argparse.Namespace) -> int:
    settings = _settings(args)
    with _opened(settings) as ledger:
        problems = ledger.differences()
        requests = sum(one.requests for one in ledger.summary(_everything(), []))
    journals = settings.data_dir / "journal"
    damaged = sorted(journals.glob("*.damaged"))
    problems += [f"{path} had damaged records; it is kept for you to look at." for path in damaged]
    for problem in problems:
        print(problem)
    waiting = len(list(journals.glob("*.live")))
    print(f"{requests} requests are summed up; {waiting} journals are in use or wait for the next start.")
    print("Rows and sums agree." if not problems else f"{len(problems)} problems.")
    return 1 if problems else 0


def _everything() -> Filter:
    from deepseek_api_compat.store.ledger_rows import Filter

    return Filter()
