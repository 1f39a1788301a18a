"""The program that renders templates: its environment, and what it may not do."""

import io
import json
import os
import resource
import subprocess
import sys
import time
from datetime import datetime
from typing import Any

import pytest

from deepseek_api_compat.protocol.template_frames import (
    EXHAUSTED,
    HEADER,
    NO_TEMPLATE,
    PROGRAM,
    REFUSED,
    RENDERED,
    Question,
    frame,
)
from deepseek_api_compat.protocol.template_process import Renderer, serve


def answer(source: str, **variables: Any) -> tuple[bytes, str]:
    return Renderer().answer({"template": 1, "source": source, "variables": variables})


def render(source: str, **variables: Any) -> str:
    status, text = answer(source, **variables)
    assert status == RENDERED, text
    return text


def test_blocks_are_trimmed_as_transformers_does() -> None:
    template = "{% for m in messages %}\n    {% if true %}\n{{ m }};\n    {% endif %}\n{% endfor %}\n"
    assert render(template, messages=["Hi"]) == "Hi;\n"


def test_names_that_templates_use() -> None:
    assert render("{% generation %}{{ x }}{% endgeneration %}!", x="Hi") == "Hi!"
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    before = datetime.now().strftime("%d %b %Y")
    assert render("{{ strftime_now('%d %b %Y') }}") in (before, datetime.now().strftime("%d %b %Y"))


def test_tojson_neither_escapes_html_nor_unicode() -> None:
    assert render("{{ x | tojson }}", x={"b": "<é> & '"}) == '{"b": "<é> & \'"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "undefined|unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ missing.name }}", "undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for x in range(1000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_what_a_template_refuses_has_a_reason(template: str, reason: str) -> None:
    status, text = answer(template, messages=[])
    assert status == REFUSED
    assert any(part in text for part in reason.split("|"))


@pytest.mark.parametrize("template", ["{% for %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
def test_what_is_no_template(template: str) -> None:
    assert answer(template)[0] == NO_TEMPLATE


def ask(questions: list[Question]) -> list[bytes]:
    """What `serve` answers, in this process; each limit it set is in the last answer."""
    asked = io.BytesIO(b"".join(frame(json.dumps(one).encode()) for one in questions))
    given = io.BytesIO()
    limits: list[tuple[int, int]] = []
    serve(asked, given, Renderer(), lambda memory, seconds: limits.append((memory, seconds)))
    return [*frames(given.getvalue()), repr([seconds for _, seconds in limits]).encode()]


def frames(data: bytes) -> list[bytes]:
    found = []
    while data:
        end = HEADER + int.from_bytes(data[:HEADER], "big")
        found.append(data[HEADER:end])
        data = data[end:]
    return found


def test_a_template_is_sent_once() -> None:
    first: Question = {"template": 1, "source": "{{ x }}é", "variables": {"x": "a"}, "seconds": 3}
    again: Question = {"template": 1, "variables": {"x": "\ud800b"}, "seconds": 4}
    assert ask([first, again]) == [b"", "Taé".encode(), "T?bé".encode(), b"[1, 3, 1, 4]"]


def test_memory_that_runs_out_is_said_and_ends_the_process() -> None:
    hungry: Question = {"template": 1, "source": "{{ 'x' * n }}", "variables": {"n": 1 << 62}, "seconds": 1}
    assert ask([hungry, hungry])[:-1] == [b"", EXHAUSTED]


@pytest.fixture
def process() -> Any:
    with subprocess.Popen(
        [sys.executable, "-m", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert read(process) == b""
            yield process
        finally:
            process.kill()


def read(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.read(int.from_bytes(process.stdout.read(HEADER), "big"))


def tell(process: subprocess.Popen[bytes], source: str, seconds: int = 5, **variables: Any) -> None:
    question = {"template": id(source), "source": source, "seconds": seconds, "variables": variables}
    assert process.stdin is not None
    process.stdin.write(frame(json.dumps(question).encode()))
    process.stdin.flush()


FILTERS = """{{ [3, 1] | sort | join(',') }}{{ 'a b' | wordwrap(1) | title | urlize }}{{ x | pprint }}\
{{ 'é' | urlencode }}{{ 10000 | filesizeformat }}{{ {'a': 1} | xmlattr }}{{ '<b>' | striptags | escape }}\
{{ lipsum(1, false) | length > 0 }}{{ strftime_now('%A %d %B %Y %H:%M %z') | length > 0 }}{{ [1] | random }}\
{{ 'x' | format }}{{ [{'a': 1}] | groupby('a') }}{% for a in [1] | batch(2) %}{{ a }}{% endfor %}"""


def test_all_that_templates_use_works_without_files(process: subprocess.Popen[bytes]) -> None:
    tell(process, FILTERS, x=["é"])
    assert read(process) == b"T" + render(FILTERS, x=["é"]).encode()
    for source in ("{% nothing %}", "{{ x.y.z }}", "{{ '\\N{BULLET}' }}"):
        tell(process, source)
        assert read(process)[:1] == answer(source)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process can be read on Linux")
def test_no_file_can_be_opened(process: subprocess.Popen[bytes]) -> None:
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        assert resource.prlimit(process.pid, kind) == (0, 0)
    assert sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["0", "1", "2"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**10 }}",  # while it is compiled
        "{{ x * 10**10 }}",
        "{% set n = namespace(t='x' * 1000) %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ [x] * 10**9 }}",
    ],
)
def test_memory_is_limited(process: subprocess.Popen[bytes], source: str) -> None:
    tell(process, source, x="x")
    assert read(process) == EXHAUSTED
    assert process.wait(5) == 0


def test_time_is_limited_even_if_nobody_waits(process: subprocess.Popen[bytes]) -> None:
    tell(process, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", seconds=0)
    began = time.monotonic()
    assert process.wait(20) < 0
    assert time.monotonic() - began < 15  # a busy machine; the limit counts processor time


def test_it_ends_with_its_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(5) == 0


def test_what_ends_it_quotes_nothing() -> None:
    """Its messages go into the gateway's log."""
    question = frame(json.dumps({"canary": "prompt"}).encode())
    done = subprocess.run([sys.executable, "-m", PROGRAM], input=question, capture_output=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr == b"The process that renders templates ended: KeyError.\n"
