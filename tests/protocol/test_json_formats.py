"""The texts of formats."""

from __future__ import annotations

import pytest

from deepseek_api_compat.protocol.json_formats import format_expr

RIGHT = {
    "date": ["2026-11-23", "2024-02-29", "0000-12-31"],
    "time": ["23:59:60Z", "00:00:00.125+01:30", "12:00:00z"],
    "date-time": ["2026-11-23T01:02:03Z", "2026-11-23t01:02:03.5-00:00"],
    "duration": ["P1Y2M3D", "P1W", "PT1H30M", "P3DT5S", "P1Y"],
    "email": ["a@b", "first.last+tag@sub.example.com", "x@[127.0.0.1]"],
    "hostname": ["a", "a-b.example.com", "1.2"],
    "ipv4": ["0.0.0.0", "255.249.1.19"],
    "ipv6": ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "fe80::1:2", "1:2:3:4:5:6:7::"],
    "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
}
WRONG = {
    "date": ["2026-13-01", "2026-02-30", "2026-04-31", "26-01-01"],
    "time": ["24:00:00Z", "12:00:00", "12:60:00Z", "1:00:00Z"],
    "date-time": ["2026-11-23 01:02:03Z", "2026-11-23"],
    "duration": ["P", "PT", "1Y", "P1YT", "P1Y3D", "PT1H5S", "P1W2D"],
    "email": ["a", "a@", "@b", "a..b@c", "a@-b"],
    "hostname": ["", "-a", "a-", "a..b", "a_b", "a" * 64],
    "ipv4": ["1.2.3", "256.1.1.1", "01.1.1.1", "1.2.3.4.5"],
    "ipv6": ["1:2:3:4:5:6:7", "1::2::3", "12345::", ":::", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7::8"],
    "uuid": ["123e4567e89b12d3a456426614174000", "g23e4567-e89b-12d3-a456-426614174000"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_formats(name: str) -> None:
    expr = format_expr(name)
    assert [text for text in RIGHT[name] if not expr.matches(text)] == []
    assert [text for text in WRONG[name] if expr.matches(text)] == []


def test_no_such_format() -> None:
    with pytest.raises(KeyError):
        format_expr("uri")
