"""`deepseek-api ledger` on a ledger with four requests."""

import csv
import json
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from deepseek_api_compat.cli import main
from deepseek_api_compat.cli.ledger import _moment
from deepseek_api_compat.store.ledger import open_ledger
from deepseek_api_compat.store.ledger_rows import Batch, LedgerRow

MIDNIGHT = 1_780_012_800  # 2026-05-29 00:00 UTC


def row(id: str, seconds: int, **fields: object) -> LedgerRow:
    counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"), 10)
    values = {"outcome": "ok", "model": "deepseek-v3", "key_id": "alice", "token_id": None, **fields}
    return LedgerRow(
        request_id=id,
        started=(MIDNIGHT + seconds) * 1000,
        endpoint="/chat/completions",
        replica=0,
        status=200,
        error_code=None,
        finish="stop",
        queue_ms=None,
        ttft_ms=1,
        total_ms=2,
        sent_tokens=10,
        price=1_500_000,
        **counts,
        **values,
    )


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    ledger = open_ledger(tmp_path)
    rows = [
        row("a", 0),
        row("b", 3600, outcome="error"),
        row("c", 3600, key_id="bob", token_id="=1+1"),
        row("d", 86400, model="r1"),
    ]
    ledger.take_in(Batch("w", "w.log", 0, 1, rows, []))
    ledger.close()
    return tmp_path


def run(data_dir: Path, *words: str) -> int:
    return main(["ledger", *words, "--data-dir", str(data_dir)])


def test_a_summary_is_a_table(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data_dir, "summary", "--by", "key", "--by", "day") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        "KEY",
        "DAY",
        "REQUESTS",
        "NOT",
        "OK",
        "PROMPT",
        "CACHED",
        "COMPLETION",
        "REASONING",
        "USD",
    ]
    assert sorted(lines[1:]) == [
        ["alice", "2026-05-29", "2", "1", "20", "20", "20", "20", "3.000000"],
        ["alice", "2026-05-30", "1", "0", "10", "10", "10", "10", "1.500000"],
        ["bob", "2026-05-29", "1", "0", "10", "10", "10", "10", "1.500000"],
    ]


def test_a_summary_is_json(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--since", "2026-05-29T01:00", "--until", "2026-05-30", "--key", "bob")
    assert run(data_dir, "summary", "--by", "hour", "--json", *words) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["start"], one["requests"], one["price"]) == (MIDNIGHT + 3600, 1, 1_500_000)
    assert one["outcomes"] == {"ok": 1}


def test_by_hour_and_by_day_exclude_each_other(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data_dir, "summary", "--by", "hour", "--by", "day") == 1
    assert "not both" in capsys.readouterr().err


def test_export_as_csv(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    assert run(data_dir, "export", str(file)) == 0
    with file.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert [one["request_id"] for one in found] == ["a", "b", "c", "d"]
    assert found[0]["price"] == "1500000"
    assert found[0]["token_id"] == ""
    assert found[2]["token_id"] == "'=1+1"  # no formula for a spreadsheet
    assert file.stat().st_mode & 0o777 == 0o600
    assert not Path(f"{file}.part").exists()


def test_export_as_json_lines_to_standard_output(
    data_dir: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run(data_dir, "export", "-", "--format", "jsonl", "--outcome", "error") == 0
    (one,) = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert (one["request_id"], one["queue_ms"]) == ("b", None)


def test_export_as_parquet(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    assert run(data_dir, "export", str(file), "--model", "deepseek-v3") == 0
    table = pyarrow.parquet.read_table(file)
    assert table.column("request_id").to_pylist() == ["a", "b", "c"]
    assert table.schema.field("price").type == "int64"
    assert table.column("queue_ms").to_pylist() == [None] * 3


def test_without_pyarrow_parquet_says_what_to_install(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(data_dir, "export", str(tmp_path / "rows.parquet")) == 1
    assert "deepseek-api-compat[parquet]" in capsys.readouterr().err
    assert not (tmp_path / "rows.parquet").exists()


def test_a_file_that_can_not_be_written_is_one_sentence(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data_dir, "export", str(tmp_path / "none" / "rows.csv")) == 1
    assert "Can't write" in capsys.readouterr().err


def test_verify(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data_dir, "verify") == 0
    assert "4 requests" in capsys.readouterr().out
    (data_dir / "journal").mkdir()
    (data_dir / "journal" / "w0.1.log.damaged").touch()
    assert run(data_dir, "verify") == 1
    assert "damaged records" in capsys.readouterr().out


def test_without_a_ledger_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "summary") == 1
    assert "no service has started there yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-05-29", MIDNIGHT),
        ("2026-05-29T01:00", MIDNIGHT + 3600),
        ("2026-05-29T01:00+01:00", MIDNIGHT),
        ("2026-05-29T00:00:00Z", MIDNIGHT),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert _moment(text) == expected


@pytest.mark.parametrize(("text", "seconds"), [("7d", 604800), ("12h", 43200), ("30m", 1800)])
def test_times_ago(text: str, seconds: int) -> None:
    assert abs(_moment(text) - (time.time() - seconds)) < 5


def test_what_is_no_time_is_refused(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(data_dir, "summary", "--since", "yesterday")
    assert "is no time" in capsys.readouterr().err
