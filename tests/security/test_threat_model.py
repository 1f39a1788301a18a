"""docs/security.md names a test for each defence, and each of those tests exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
TEXT = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
PROMISED, UNDEFENDED = TEXT.split("## What is not defended")
THREATS = [row for row in re.findall(r"^\|.*\|$", PROMISED, re.MULTILINE) if row.count("|") == 4]


def names_of_tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds) and node.name.startswith("test_")}


def test_every_threat_has_a_test_that_exists():
    rows = [row for row in THREATS if "| shown by |" not in row and "---" not in row]
    assert len(rows) > 30
    missing = []
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row.split("|")[3])
        missing += [row[:80]] if not named else []
        missing += [
            f"{file}::{name}"
            for file, name in named
            if not (TESTS / file).exists() or name not in names_of_tests(TESTS / file)
        ]
    assert missing == []


def test_the_published_holes_of_others_are_among_the_threats():
    defended = "\n".join(row for row in THREATS if "test_" in row)
    holes = (
        "CVE-2026-42208",
        "CVE-2026-49468",
        "CVE-2026-35030",
        "CVE-2026-34756",
        "vllm#18892",
        "vllm#58144",
    )
    assert [hole for hole in (*holes, "new-api#4746", "one-api#2388") if hole not in defended] == []


def test_what_is_not_defended_is_said():
    assert len(re.findall(r"^- \*\*", UNDEFENDED, re.MULTILINE)) >= 5
