"""Rows out of dumps as the three programs write them; for SQLite the program itself, through Python's."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.sql_dump import Row, read_dump
from deepseek_api_compat.moving.tables import read_tables

NASTY = "it's; a \"test\" \\n (1,2)\nINSERT INTO tokens VALUES (9,'no');\n\\.\tä;--"


def rows(path: Path, text: str, *tables: str) -> list[tuple[str, Row]]:
    path.write_text(text, encoding="utf-8")
    return list(read_dump(path, tables or ("tokens",)))


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return tmp_path / "dump.sql"


def quoted_mysql(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace('"', '\\"')


def test_mysqldump(dump: Path) -> None:
    text = f"""-- MySQL dump 10.13  Distrib 8.0.36, for Linux (x86_64)
/*!40101 SET @OLD_CHARACTER_SET_CLIENT=@@CHARACTER_SET_CLIENT */;
DROP TABLE IF EXISTS `tokens`;
CREATE TABLE `tokens` (
  `id` bigint NOT NULL AUTO_INCREMENT,
  `key` varchar(48) DEFAULT 'a,(b',
  `price` decimal(10,2) DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `idx_tokens_key` (`key`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;
INSERT INTO `logs` VALUES (1,'{quoted_mysql(NASTY)}');
INSERT INTO `tokens` VALUES (1,'{quoted_mysql(NASTY)}',NULL),(2,_binary 'b',-1.5e3);
"""
    assert rows(dump, text) == [
        ("tokens", {"id": 1, "key": NASTY, "price": None}),
        ("tokens", {"id": 2, "key": "b", "price": -1500.0}),
    ]


def test_pg_dump_copy_and_inserts(dump: Path) -> None:
    copied = NASTY.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    doubled = NASTY.replace("'", "''")
    text = f"""--
-- PostgreSQL database dump
--
\\restrict abc
SET client_encoding = 'UTF8';
CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN -- don't
 END; $$;
COPY public.logs (id, content) FROM stdin;
1\tit's
\\.
COPY public."LiteLLM_VerificationToken" (token, models, "user_id") FROM stdin;
{copied}\t{{a,"b c"}}\t\\N
\\.
INSERT INTO public.logs VALUES (1, '{doubled}');
INSERT INTO public.tokens (id, key, on_) VALUES (1, '{doubled}', true), (2, E'a\\'b\\n', false);
INSERT INTO public.tokens (id, key, on_) VALUES (3, '{{x}}'::text[], NULL) ON CONFLICT DO NOTHING;
"""
    assert rows(dump, text, "tokens", "LiteLLM_VerificationToken") == [
        ("LiteLLM_VerificationToken", {"token": NASTY, "models": '{a,"b c"}', "user_id": None}),
        ("tokens", {"id": 1, "key": NASTY, "on_": True}),
        ("tokens", {"id": 2, "key": "a'b\n", "on_": False}),
        ("tokens", {"id": 3, "key": "{x}", "on_": None}),
    ]


@pytest.mark.parametrize("literal", ["'{}'", "replace('{}','\\n',char(10))", "unistr('{}')"])
def test_sqlite_dump(dump: Path, literal: str) -> None:
    value = NASTY
    written = value.replace("'", "''")
    if literal.startswith("replace"):
        value = value.replace("\\", "")
        written = value.replace("'", "''").replace("\n", "\\n")
    elif literal.startswith("unistr"):
        written = written.replace("\\", "\\\\").replace("\n", "\\u000a")
    text = f"""PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE `tokens` (`id` integer PRIMARY KEY AUTOINCREMENT,`key` varchar(48) DEFAULT "",`n` numeric(3,1));
INSERT INTO tokens VALUES(1,{literal.format(written)},1.5);
CREATE INDEX `idx` ON `tokens`(`key`);
COMMIT;
"""
    assert rows(dump, text) == [("tokens", {"id": 1, "key": value, "n": 1.5})]


def test_a_dump_says_what_the_database_says(tmp_path: Path, dump: Path) -> None:
    file = tmp_path / "one-api.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE tokens (id INTEGER, `key` TEXT, quota REAL)")
        database.execute("CREATE TABLE logs (id INTEGER, content TEXT)")
        database.execute("INSERT INTO logs VALUES (1, ?)", (NASTY,))
        many = [(number, f"{NASTY}{number}", number / 4) for number in range(50)]
        database.executemany("INSERT INTO tokens VALUES (?, ?, ?)", many)
        database.commit()
        dump.write_text("\n".join(database.iterdump()), encoding="utf-8")
    assert read_tables(dump, ["tokens"]) == read_tables(file, ["tokens"])
    assert len(read_tables(file, ["tokens"])["tokens"]) == 50


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("INSERT INTO tokens (a) VALUES (1", "line 1, table tokens: the file ends in the middle"),
        ("\nINSERT INTO tokens (a) VALUES (1, 2);", "line 2, table tokens: a row has 2 values for 1 col"),
        ("INSERT INTO tokens VALUES (1);", "table tokens: no CREATE TABLE"),
        ("INSERT INTO tokens (a) VALUES (now());", "table tokens: a row can't be read"),
        ("INSERT INTO tokens (a) SELECT 1;", "an INSERT without VALUES"),
        ("COPY tokens (a, b) FROM stdin;\n1\t2\n", "line 2, table tokens: the file ends"),
        ("COPY tokens (a, b) FROM stdin;\n1\n\\.\n", "line 2, table tokens: a row has 1 values for 2"),
    ],
)
def test_what_is_broken_is_named(dump: Path, text: str, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        rows(dump, text)


def test_every_cut_of_a_dump_is_noticed_or_gives_whole_rows(dump: Path) -> None:
    line = f"INSERT INTO `tokens` (`id`,`key`) VALUES (1,'{quoted_mysql(NASTY)}'),(2,'b');\n"
    for end in range(10, len(line) - 2):
        try:
            found = rows(dump, line[:end])
        except SetupError:
            continue
        assert found == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("k.json", "{"),
        ("k.json", '{"keys": 1}'),
        ("k.jsonl", '{"a": 1}\n[]'),
        ("k.csv", "a,b\n1\n"),
        ("k.csv", "a,b\n1,2,3\n"),
        ("k.db", "SQLite format 3\0broken"),
        ("k.sql", "nothing of the kind"),
    ],
)
def test_no_other_form_is_half_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SetupError, match=name):
        read_tables(tmp_path / name, ["tokens"])
    with pytest.raises(SetupError, match="Can't read"):
        read_tables(tmp_path / "none", ["tokens"])
