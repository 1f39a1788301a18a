"""Which requests are answered from the cache, with what, and what happens when it can't be used."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import PluginSettings
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.gateway.plugins import Plugin
from deepseek_api_compat.plugins import (
    Context,
    Event,
    Finish,
    Outcome,
    Reasoning,
    Refuse,
    Reply,
    Text,
    ToolCall,
    Usage,
)
from deepseek_api_compat.plugins.answer_cache import RESTS, AnswerCache
from deepseek_api_compat.plugins.answer_store import FILE, AnswerStore
from deepseek_api_compat.protocol.job import TokenLogprob

FINE = Outcome(200, "stop", 9, 4, 3, 1.0, 0.5, None, 1)
HELLO = [Text(0, "Hel"), Text(0, "lo"), Finish(0, "stop")]
ANSWER = [Text(0, "Hello"), Finish(0, "stop"), Usage(9, 4, 3, 1)]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cached:
    """A cache in a folder, asked as the service asks it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.clock = Clock()
        self.cache = AnswerCache(**options, clock=self.clock)

    def ask(
        self,
        said: str = "Hi",
        answer: Sequence[Event] = HELLO,
        outcome: Outcome = FINE,
        key_id: str = "key",
        **fields: Any,
    ) -> Sequence[Event] | None:
        """The answer from the cache; None if it was made anew."""
        request = {"model": "m", "messages": [{"role": "user", "content": said}], "temperature": 0, **fields}
        context = Context("req", key_id, "m", False, self.folder)
        made = self.cache.pre_process(request, context)
        if not isinstance(made, Reply):
            assert "cache" not in made
            for event in answer:
                assert self.cache.on_event(event, context) is None
        self.cache.post_process(outcome, context)
        return made.events if isinstance(made, Reply) else None


@pytest.fixture
def cached(tmp_path: Path) -> Any:
    made = []

    def make(**options: Any) -> Cached:
        made.append(Cached(tmp_path / "answer-cache", **options))
        return made[-1]

    yield make
    for one in made:
        one.cache.close()


def test_the_same_request_has_the_same_answer(cached: Any, caplog: pytest.LogCaptureFixture):
    one = cached()
    assert one.ask() is None
    with caplog.at_level(logging.DEBUG, "deepseek_api"):
        assert one.ask() == ANSWER
    assert "Answered from the cache." in caplog.text


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"temperature": 0.0},
        {"seed": None},
    ],
)
def test_what_makes_no_difference(cached: Any, fields: dict[str, Any]):
    one = cached()
    assert one.ask() is None
    assert one.ask(**fields) == ANSWER


@pytest.mark.parametrize(
    "fields",
    [
        {"said": "Hi "},
        {"key_id": "other"},
        {"model": "alias"},
        {"seed": 1},
        {"max_tokens": 5},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"thinking": {"type": "enabled"}},
        {"unknown": 1},
    ],
)
def test_what_makes_a_difference(cached: Any, fields: dict[str, Any]):
    one = cached()
    assert one.ask() is None
    assert one.ask(**fields) is None


@pytest.mark.parametrize("temperature", [None, 0.01, 1])
def test_only_temperature_0(cached: Any, temperature: float | None):
    one = cached()
    for _ in range(2):
        assert one.ask(temperature=temperature) is None


def test_what_an_address_leads_to_may_change(cached: Any):
    one = cached()
    for url, kept in (("https://example.com/a.png", None), ("data:image/png;base64,AAAA", ANSWER)):
        for image in ({"url": url}, url):
            part = {"type": "image_url", "image_url": image}
            assert one.ask([part]) is None
            assert one.ask([part]) == kept


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ([Text(0, "cut"), Finish(0, "length")], FINE),
        ([Text(0, "x"), Finish(0, "content_filter")], FINE),
        ([Text(0, "gone")], replace(FINE, status=499)),
        (HELLO, replace(FINE, status=499)),
        (HELLO, replace(FINE, error_code="engine_failed")),
        (HELLO, replace(FINE, status=503)),
        ([Text(0, "no end")], FINE),
    ],
)
def test_only_whole_answers_are_kept(cached: Any, answer: Sequence[Event], outcome: Outcome):
    one = cached()
    for _ in range(2):
        assert one.ask(answer=answer, outcome=outcome) is None


def test_all_parts_of_an_answer_are_kept(cached: Any):
    one = cached()
    token = TokenLogprob("a", -0.5, [97], [TokenLogprob("b", -1.5, [98])])
    answer = [
        Reasoning(1, "so"),
        Text(0, "a", [token]),
        Reasoning(1, " it"),
        Text(0, "b", [token]),
        ToolCall(1, 0, "c", "f", ""),
        Finish(0, "stop"),
        ToolCall(1, 0, arguments='{"x"'),
        ToolCall(1, 0, arguments=": 1}"),
        ToolCall(1, 1, "d", "g", "{}"),
        Finish(1, "tool_calls"),
    ]
    assert one.ask(answer=answer, n=2) is None
    assert one.ask(answer=answer, n=2) == [
        Text(0, "ab", [token, token]),
        Finish(0, "stop"),
        Reasoning(1, "so it"),
        ToolCall(1, 0, "c", "f", '{"x": 1}'),
        ToolCall(1, 1, "d", "g", "{}"),
        Finish(1, "tool_calls"),
        Usage(9, 4, 3, 1),
    ]


def test_one_of_two_choices_is_not_the_answer(cached: Any):
    one = cached()
    for _ in range(2):
        assert one.ask(n=2) is None


def test_one_cache_for_all_keys(cached: Any):
    one = cached(shared=True)
    assert one.ask(key_id="a") is None
    assert one.ask(key_id="b") == ANSWER


def test_a_request_may_opt_out(cached: Any):
    one = cached()
    assert one.ask(cache={"no-store": True}) is None
    assert one.ask(cache={"no-cache": False}) is None
    assert one.ask(cache={}) == ANSWER
    newer = [Text(0, "newer"), Finish(0, "stop")]
    assert one.ask(cache={"no-cache": True}, answer=newer) is None
    assert one.ask()[0] == Text(0, "newer")


@pytest.mark.parametrize("given", [True, {"no-cache": 1}, {"ttl": 60}, []])
def test_a_wrong_wish_is_refused(cached: Any, given: Any):
    with pytest.raises(Refuse) as refused:
        cached().ask(cache=given, temperature=1)
    assert (refused.value.status, refused.value.param) == (400, "cache")


def test_answers_grow_old(cached: Any):
    one = cached(ttl=60)
    assert one.ask() is None
    one.clock.now += 59
    assert one.ask() == ANSWER
    one.clock.now += 1  # from when it was made, not from its last use
    assert one.ask() is None


def test_what_was_not_used_for_longest_goes_first(cached: Any):
    one = cached(max_entries=2)
    for said in ("a", "b", "a", "c"):
        one.ask(said)
        one.clock.now += 1
    assert one.ask("a") == ANSWER
    assert one.ask("b", cache={"no-store": True}) is None
    assert one.ask("c") == ANSWER


def test_no_more_bytes_than_allowed(cached: Any):
    one = cached(max_bytes=3000)
    for said in "abcd":
        one.ask(said, [Text(0, "x" * 1000), Finish(0, "stop")])
        one.clock.now += 1
    one.ask("large", [Text(0, "x" * 3000), Finish(0, "stop")])
    kept = [said for said in ("a", "b", "c", "d", "large") if one.ask(said, cache={"no-store": True})]
    assert kept == ["c", "d"]


def test_another_worker_and_the_next_start_have_the_same_cache(cached: Any):
    first, second = cached(), cached()
    assert first.ask() is None
    assert second.ask() == ANSWER
    second.ask("other")
    first.cache.close()
    second.cache.close()
    assert cached().ask("other") == ANSWER


def test_nobody_else_may_read_it(cached: Any):
    one = cached()
    one.ask()
    assert stat.S_IMODE(one.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in one.folder.iterdir()} == {0o600}


def test_deleting_the_folder_empties_it(cached: Any):
    one = cached()
    one.ask()
    for file in one.folder.iterdir():
        file.unlink()
    one.folder.rmdir()
    assert one.ask() is None
    assert one.ask() == ANSWER


def test_a_broken_file_means_no_cache(cached: Any, caplog: pytest.LogCaptureFixture):
    one = cached()
    one.folder.mkdir()
    (one.folder / FILE).write_bytes(b"no database" * 1000)
    for _ in range(2):
        assert one.ask() is None
    assert caplog.text.count("can't be used") == 1
    (one.folder / FILE).unlink()
    assert one.ask() is None
    assert one.ask() is None
    one.clock.now += RESTS
    assert one.ask() is None
    assert one.ask() == ANSWER


def test_a_folder_that_can_not_be_made_means_no_cache(cached: Any, tmp_path: Path):
    (tmp_path / "answer-cache").write_text("a file")
    one = cached()
    for _ in range(2):
        assert one.ask() is None


def test_a_full_file_means_no_cache(cached: Any):
    one = cached()
    one.ask("first")
    one.cache._store._connection.execute("PRAGMA max_page_count = 1")
    large = [Text(0, os.urandom(1 << 20).hex()), Finish(0, "stop")]
    assert one.ask("second", large) is None
    one.clock.now += RESTS
    assert one.ask("first") == ANSWER
    assert one.ask("second") is None


def test_an_answer_that_can_not_be_read_is_made_anew(cached: Any):
    one = cached()
    one.ask()
    with sqlite3.connect(one.folder / FILE) as connection:
        connection.execute("UPDATE answers SET answer = ?", (b'[["Text", 1]]',))
    connection.close()
    assert one.ask() is None
    assert one.ask() == ANSWER


@pytest.mark.parametrize("options", [{"ttl": 0}, {"max_entries": 0}, {"max_bytes": -1}, {"size": 1}])
def test_wrong_options(options: dict[str, Any]):
    with pytest.raises(ConfigError):
        Plugin(PluginSettings(use="deepseek_api_compat.plugins.answer_cache:AnswerCache", options=options))


def test_workers_that_start_together(tmp_path: Path):
    """One makes the file, and the others wait for that."""
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        workers = [AnswerStore(60, 20, 1 << 20) for _ in range(8)]
        together = threading.Barrier(len(workers))

        def start(store: AnswerStore, together: threading.Barrier = together, folder: Path = folder) -> None:
            together.wait()
            assert store.get(folder, b"key") is None

        with ThreadPoolExecutor(len(workers)) as pool:
            for done in [pool.submit(start, store) for store in workers]:
                done.result()
        for store in workers:
            store.close()


def test_workers_do_not_wait_for_each_other(tmp_path: Path):
    """Each has the file open, and all write to it at the same time."""
    workers = [AnswerStore(60, 20, 1 << 20) for _ in range(4)]

    def work(store: AnswerStore) -> None:
        for number in range(60):
            key = b"%d" % (number % 30)
            answer = store.get(tmp_path, key)
            assert answer in (None, key * 100)
            if answer is None:
                store.put(tmp_path, key, key * 100)

    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(work, store) for store in workers]:
            done.result()
    for store in workers:
        store.close()
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (20,)
