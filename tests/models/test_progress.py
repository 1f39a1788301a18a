from __future__ import annotations

import io

import pytest

from deepseek_api_compat.models.progress import Progress, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_for_each_tenth() -> None:
    log = io.StringIO()
    with Progress(log).bar("Fetching x", 2_000_000) as bar:
        for _ in range(2000):
            bar.add(1000)
    lines = log.getvalue().splitlines()
    assert lines[0] == "Fetching x: 0% (0 B of 2.0 MB)"
    assert lines[5] == "Fetching x: 50% (1.0 MB of 2.0 MB)"
    assert len(lines) == 11


def test_a_terminal_gets_one_line_that_is_always_ended() -> None:
    terminal = Terminal()
    bar = Progress(terminal).bar("Fetching x", 1000)

    def broken() -> None:
        with bar:
            bar.add(500)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    last = text.split("\r")[-1]
    assert last.startswith("Fetching x [############------------]  50% of 1.0 kB, ")
    assert "/s" in last


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (92_871_040, "92.9 MB"),
        (689e9, "689 GB"),
        (1.6e12, "1600 GB"),
    ],
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size(count) == text
