"""What is personal data in a text, and what only looks like it."""

from __future__ import annotations

import time

import pytest

from deepseek_api_compat.plugins.pii_kinds import DEFAULT, KINDS, chosen, find, identity_card, luhn

ALL = chosen(list(KINDS), {})
USUAL = chosen(DEFAULT, {})


def found(text: str, kinds=ALL) -> list[tuple[str, str]]:
    return [(one.label, text[one.start : one.end]) for one in find(text, kinds)]


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("EMAIL", "zhang.san+x@mail.example.com.cn"),
        ("EMAIL", "zhang＠example．com"),
        ("PHONE", "13812345678"),
        ("PHONE", "138 1234 5678"),
        ("PHONE", "+86 138-1234-5678"),
        ("PHONE", "(+86)13812345678"),
        ("PHONE", "008613812345678"),
        ("PHONE", "１３８１２３４５６７８"),
        ("PHONE", "+1 (415) 555-2671"),
        ("PHONE", "+442071838750"),
        ("ID_CARD", "11010519491231002X"),
        ("ID_CARD", "11010519491231002x"),
        ("ID_CARD", "110105 19491231 002X"),
        ("ID_CARD", "１１０１０５１９４９１２３１００２Ｘ"),
        ("BANK_CARD", "4111111111111111"),
        ("BANK_CARD", "4111 1111 1111 1111"),
        ("BANK_CARD", "4111－1111－1111－1111"),
        ("BANK_CARD", "3782 822463 10005"),
        ("BANK_CARD", "6222021234567890128"),
        ("SECRET", "sk-proj-abcdefghijklmnop1234"),
        ("SECRET", "AKIAIOSFODNN7EXAMPLE"),
        ("SECRET", "ghp_" + "a1B2" * 9),
        ("SECRET", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"),
        ("SECRET", "-----BEGIN RSA PRIVATE KEY-----\nMIIabc+/=\n-----END RSA PRIVATE KEY-----"),
        ("IP", "192.168.0.1"),
        ("IP", "2001:db8::ff00:42:8329"),
        ("PASSPORT", "E12345678"),
        ("PASSPORT", "EA1234567"),
    ],
)
@pytest.mark.parametrize(
    "around", ["{}", "请联系{}，谢谢", "'{}'", "1.{}", "x: {}. y", "\\u8bd1{}\\n", '"{}"']
)
def test_what_is_found(label: str, value: str, around: str):
    if around == "1.{}" and label in ("IP", "EMAIL"):
        return  # a part of the address
    if around == "\\u8bd1{}\\n" and label == "IP" and ":" in value:
        return  # "\n" would be a part of it
    assert found(around.format(value)) == [(label, value)]


@pytest.mark.parametrize(
    "text",
    [
        "no@dot, @nobody, a@b.1",
        "12345678901, 1381234567, 138123456789, 0.4111111111111111",
        "11010519491231002Y 110105194912310021 110105194913310026",
        "4111111111111112, 1700000000000, 41111111111111111111",
        "+123456, 1+1000000",
        "task-sk-short, eyJ.eyJ.x, AKIA",
        "300.1.1.1, 1.2.3, 1.2.3.4.5, 12:30:45, std::vector",
        "E1234567890",
    ],
)
def test_what_is_not_found(text: str):
    assert found(text) == []


def test_a_card_between_other_numbers():
    assert found("in 2024 4111 1111 1111 1111 123", USUAL) == [("BANK_CARD", "4111 1111 1111 1111")]


def test_what_overlaps_is_one():
    assert found("13812345678@qq.com", USUAL) == [("EMAIL", "13812345678@qq.com")]
    both = chosen(["email"], {"order": "x@q[a-z]+[.]com-[0-9]+"})
    assert found("max@qq.com-77", both) == [("EMAIL", "max@qq.com-77")]


def test_check_digits():
    assert identity_card("11010519491231002X")
    assert sum(identity_card("11010519491231002" + last) for last in "0123456789X") == 1
    assert sum(luhn("411111111111111" + last) for last in "0123456789") == 1


def test_patterns_of_ones_own():
    kinds = chosen([], {"staff": r"STAFF-\d{4}"})
    assert found("It is STAFF-1234.", kinds) == [("STAFF", "STAFF-1234")]


@pytest.mark.parametrize(
    ("kinds", "patterns"),
    [(["face"], {}), ([], {"email": "x"}), ([], {"a b": "x"}), ([], {"a": "("}), ([], {"": "x"})],
)
def test_kinds_and_patterns_that_can_not_be(kinds: list[str], patterns: dict[str, str]):
    with pytest.raises(ValueError, match=r"kind|pattern"):
        chosen(kinds, patterns)


HARD = [
    "a", "a.", "a@", "a@a.", "@a.", "1", "12 ", "1234 ", "1234-", "4111 1111 1111 111 ", "+1 ", "+1(", "1 2 ",
    "sk-", "eyJ", "eyJ-", "eyJaaaaaaaa.", "eyJ.", "pypi-", "ghp_", "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN A", "1.", "1.1.1.", "a:", ":", "::", "E1", "\\u", "１", "19491231", "<", "-", " ",
]  # fmt: skip


def test_no_text_takes_long():
    def seconds(text: str) -> float:
        began = time.process_time()
        find(text, ALL)
        return time.process_time() - began

    size = 100_000
    benign = max(seconds(("The quick brown fox, 13812345678. " * size)[:size]), 0.001)
    slowest = max((seconds((text * size)[:size]), text) for text in HARD)
    assert slowest[0] < 100 * benign, slowest
    # One that took time in proportion to the square would take a hundred times as long for ten times as much.
    longer = seconds((slowest[1] * 10 * size)[: 10 * size])
    assert longer < 40 * max(slowest[0], 0.005), slowest
