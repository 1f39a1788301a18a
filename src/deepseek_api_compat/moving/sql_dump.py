"""Rows of a few tables out of the text that mysqldump, pg_dump or `sqlite3 .dump` wrote. No SQL is executed.

Read are INSERT statements and COPY blocks of the tables asked for, and their CREATE TABLE for the names of
columns; the rest is skipped, but scanned for quotes, so that text in it is never taken for a statement.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from deepseek_api_compat.errors import SetupError

Row = dict[str, Any]  # values are str, int, float, bool or None

_NAME = r"(?:`[^`]+`|\"[^\"]+\"|\[[^\]]+\]|\w+)"
_HEAD = re.compile(
    rf"\s*(?P<verb>INSERT\s+(?:IGNORE\s+|OR\s+\w+\s+)?INTO|CREATE\s+TABLE(?:\s+IF\s+NOT\s+EXISTS)?|COPY)\s+"
    rf"(?:(?:{_NAME})\.)?(?P<table>{_NAME})\s*",
    re.IGNORECASE,
)
_COLUMNS = re.compile(rf"\(\s*({_NAME}(?:\s*,\s*{_NAME})*)\s*\)")
_COLUMN = re.compile(rf"\s*({_NAME})\s")
_NO_COLUMN = {"PRIMARY", "UNIQUE", "KEY", "CONSTRAINT", "INDEX", "FULLTEXT", "FOREIGN", "CHECK"}
_ENDS = {
    quote: re.compile(rf"[^\\{quote}]*(?:\\.[^\\{quote}]*)*{quote}", re.DOTALL)  # a backslash escapes
    for quote in "'\""
}
_MARK = re.compile(r"\b[eE]'|['\"`;]|--|\$\w*\$")
_TOKEN = re.compile(
    r"\s*(?:(?P<null>NULL\b)|(?P<bool>true\b|false\b)|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"|(?:_\w+\s+)?(?P<prefix>[eExXbB]?)'|(?P<call>replace|unistr|char)\()",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"ON\s", re.IGNORECASE)  # CONFLICT DO NOTHING, behind the rows
_CAST = re.compile(r"\s*::\s*[\w. ]+(?:\(\d+\))?(?:\[\])?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "b": "\b", "f": "\f", "v": "\v", "Z": "\x1a"}
_COPY_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)")


def read_dump(path: Path, tables: Collection[str]) -> Iterator[tuple[str, Row]]:
    """Each row of these tables, as they come. Raises SetupError that names file, line and table."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from _Dump(path, file, tables).rows()
    except OSError as error:
        raise SetupError(f"Can't read {path}: {error.strerror}.") from None


class _Dump:
    def __init__(self, path: Path, file: TextIO, tables: Collection[str]) -> None:
        self._path = path
        self._tables = {table.lower(): table for table in tables}
        self._lines = enumerate(file, 1)
        self._columns: dict[str, list[str]] = {}
        self._mysql = False  # whether a backslash escapes in strings

    def rows(self) -> Iterator[tuple[str, Row]]:
        for number, line in self._lines:
            if line.startswith(("--", "/*", "\\")) or not line.strip():
                self._mysql = self._mysql or bool(re.match(r"-- (MySQL|MariaDB)|/\*M!", line))
                continue
            head = _HEAD.match(line)
            table = self._tables.get(_plain(head["table"]).lower()) if head else None
            verb = head["verb"].split()[0].upper() if head else ""
            if verb == "COPY" and head:
                yield from self._copied(number, line[head.end() :], table)
                continue
            mysql = self._mysql or (verb == "INSERT" and head is not None and head["table"][0] == "`")
            statement = self._statement(number, line, mysql, table)
            if head is None or table is None:
                continue
            if verb == "CREATE":
                self._columns[table] = _created_columns(statement[head.end() :])
            else:
                for row in self._inserted(number, statement, head.end(), table, mysql):
                    yield table, row

    def _statement(self, number: int, line: str, mysql: bool, table: str | None) -> str:
        """The statement that begins with this line, up to its semicolon; only scanned for no `table`."""
        parts: list[str] = []
        quote, start, backslash = "", number, mysql
        while True:
            at = 0
            while True:
                if quote:
                    end = _end_of(line, at, quote, backslash)
                    if end < 0:
                        break
                    quote, at = "", end
                    continue
                mark = _MARK.search(line, at)
                if mark is None or mark[0] == "--":
                    break
                if mark[0] == ";":
                    return "".join([*parts, line[: mark.start()]]) if table else ""
                quote, at = mark[0][-1] if mark[0][0] in "eE" else mark[0], mark.end()
                backslash = mysql or mark[0][0] in "eE"
            if table:
                parts.append(line)
            number, line = next(self._lines, (0, ""))
            if not number:
                if table is None:
                    return ""
                raise self._error(start, table, "the file ends in the middle of a statement: was it cut off?")

    def _copied(self, number: int, rest: str, table: str | None) -> Iterator[tuple[str, Row]]:
        named = _COLUMNS.match(rest)
        if "stdin" not in rest.lower():
            return
        columns = _names(named[1]) if named else self._columns.get(table or "", [])
        for number, line in self._lines:
            line = line.rstrip("\r\n")
            if line == "\\.":
                return
            if table is not None:
                values = [_copy_value(text) for text in line.split("\t")]
                yield table, self._row(number, table, columns, values)
        raise self._error(number, table or "another", "the file ends among its rows: was it cut off?")

    def _inserted(self, number: int, text: str, at: int, table: str, mysql: bool) -> Iterator[Row]:
        named = _COLUMNS.match(text, at)
        columns = _names(named[1]) if named else self._columns.get(table, [])
        values_at = re.compile(r"\s*VALUES\s*", re.IGNORECASE).match(text, named.end() if named else at)
        if values_at is None:
            raise self._error(number, table, "an INSERT without VALUES can't be read")
        at = values_at.end()
        end = len(text.rstrip())
        while at < end and not _CLAUSE.match(text, at):
            try:
                values, at = _tuple(text, at, mysql)
            except (ValueError, IndexError) as error:
                line = number + text.count("\n", 0, at)
                raise self._error(line, table, f"a row can't be read ({error})") from None
            yield self._row(number, table, columns, values)
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1

    def _row(self, number: int, table: str, columns: list[str], values: list[Any]) -> Row:
        if not columns:
            raise self._error(number, table, "no CREATE TABLE before its rows names the columns")
        if len(columns) != len(values):
            raise self._error(number, table, f"a row has {len(values)} values for {len(columns)} columns")
        return dict(zip(columns, values, strict=True))

    def _error(self, number: int, table: str, problem: str) -> SetupError:
        return SetupError(f"{self._path}, line {number}, table {table}: {problem}.")


def _end_of(line: str, at: int, quote: str, backslash: bool) -> int:
    """Behind the quote that ends what is quoted, or -1 if this line does not."""
    if backslash and quote in _ENDS:
        found = _ENDS[quote].match(line, at)
        return found.end() if found else -1
    end = line.find(quote, at)
    return end + len(quote) if end >= 0 else -1


def _plain(name: str) -> str:
    return name[1:-1] if name[0] in '`"[' else name


def _names(text: str) -> list[str]:
    return [_plain(name) for name in re.findall(_NAME, text)]


def _created_columns(body: str) -> list[str]:
    """The names of the columns in `(name type ..., name type ...)`."""
    names, depth, start = [], 0, 0
    for mark in re.finditer(r"'[^']*'|[(),]", body):
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if mark[0] == "(" and depth == 1:
            start = mark.end()
        elif (mark[0] == "," and depth == 1) or (mark[0] == ")" and depth == 0):
            column = _COLUMN.match(body[start : mark.start()] + " ")
            if column and column[1].upper() not in _NO_COLUMN:
                names.append(_plain(column[1]))
            start = mark.end()
            if depth == 0:
                break
    return names


def _copy_value(text: str) -> str | None:
    if text == "\\N":
        return None
    return _COPY_ESCAPE.sub(lambda found: _copy_escape(found[1]), text) if "\\" in text else text


def _copy_escape(code: str) -> str:
    if code[0] == "x" and len(code) > 1:
        return chr(int(code[1:], 16))
    if code.isdigit():
        return chr(int(code, 8))
    return _ESCAPES.get(code, code)


def _tuple(text: str, at: int, mysql: bool) -> tuple[list[Any], int]:
    if text[at] != "(":
        raise ValueError(f"expected a parenthesis, found {text[at : at + 20]!r}")
    values, at = _values(text, at + 1, mysql)
    return values, at


def _values(text: str, at: int, mysql: bool) -> tuple[list[Any], int]:
    """Values up to the closing parenthesis, and where it goes on behind it."""
    values: list[Any] = []
    while True:
        value, at = _value(text, at, mysql)
        values.append(value)
        while text[at].isspace():
            at += 1
        at += 1
        if text[at - 1] == ")":
            return values, at
        if text[at - 1] != ",":
            raise ValueError(f"expected a comma, found {text[at - 1 : at + 20]!r}")


def _value(text: str, at: int, mysql: bool) -> tuple[Any, int]:
    token = _TOKEN.match(text, at)
    if token is None:
        raise ValueError(f"no value: {text[at : at + 20]!r}")
    at = token.end()
    value: Any = None
    if token["bool"]:
        value = token["bool"].lower() == "true"
    elif token["number"]:
        value = float(token["number"]) if re.search("[.eE]", token["number"]) else int(token["number"])
    elif token["call"]:
        arguments, at = _values(text, at, mysql)
        value = _called(token["call"].lower(), arguments)
    elif token["prefix"] is not None:
        prefix = token["prefix"].lower()
        value, at = _string(text, at, backslash=mysql or prefix == "e")
        if prefix == "x":
            value = bytes.fromhex(value).decode("utf-8", "replace")
        elif prefix == "b":
            value = int(value or "0", 2) if set(value) <= {"0", "1"} else value
    if cast := _CAST.match(text, at):
        at = cast.end()
    return value, at


def _called(name: str, arguments: list[Any]) -> Any:
    """What `sqlite3 .dump` writes around text with line breaks in it."""
    if name == "char":
        return "".join(chr(code) for code in arguments)
    if name == "replace" and len(arguments) == 3:
        return arguments[0].replace(arguments[1], arguments[2])
    return re.sub(
        r"\\(?:u([0-9a-fA-F]{4})|(\\))", lambda m: chr(int(m[1], 16)) if m[1] else "\\", arguments[0]
    )


def _string(text: str, at: int, *, backslash: bool) -> tuple[str, int]:
    """The string whose opening quote is just before `at`, and where it goes on behind its end."""
    stop = re.compile(r"\\.|''|'" if backslash else r"''|'", re.DOTALL)
    parts = []
    while found := stop.search(text, at):
        parts.append(text[at : found.start()])
        at = found.end()
        if found[0] == "'":
            return "".join(parts), at
        parts.append("'" if found[0] == "''" else _ESCAPES.get(found[0][1], found[0][1]))
    raise ValueError("a string does not end")
