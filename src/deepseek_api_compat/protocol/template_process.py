"""The program that renders chat templates where they can do no harm: `python -m` and this module's name.

A model's chat template is a program of strangers. Jinja's sandbox keeps it off Python's insides, but not
from looping for ever or from asking for all the memory there is (`{{ 'x' * 10**12 }}` does that while it
is compiled). So it runs in this process, which may open no file, start no process and connect to nothing,
and which the kernel stops at so many seconds and bytes. Whoever started it only loses an answer.

Frames come on standard input and go to standard output: four bytes of length, most significant first, and
then the content. A question is JSON, `Question`; an answer is one byte, a status, and UTF-8 text.
The process ends with its standard input. A caller that is killed in mid-render can't be seen going, but
the processor time of one render is bounded too. It imports little, to be quick and small.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, BinaryIO

import jinja2
import jinja2.debug  # Jinja imports it at the first error, and then no file may be opened any more
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_api_compat.protocol.template_frames import (
    EXHAUSTED,
    HEADER,
    NO_TEMPLATE,
    REFUSED,
    RENDERED,
    Question,
    frame,
)

MOST_DESCRIPTORS = 1 << 16  # that a caller may have handed down
MEMORY = 512 << 20  # bytes, beyond what the process has when it starts to listen
MEMORY_PER_BYTE = 16  # of a question: characters take up to four bytes, and the text is there several times


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model was trained on; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which models have never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers' `apply_chat_template`."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return made


class Renderer:
    """Answers questions; keeps the templates it has seen."""

    def __init__(self) -> None:
        self._environment = environment()
        self._templates: dict[int, jinja2.Template] = {}

    def answer(self, question: Question) -> tuple[bytes, str]:
        """A status and its text. Only memory that runs out (MemoryError) passes through."""
        try:
            template = self._template(question)
        except MemoryError:
            raise
        except Exception as error:
            return NO_TEMPLATE, str(error) or type(error).__name__
        try:
            return RENDERED, template.render(question["variables"])
        except MemoryError:
            raise
        except Exception as error:  # whatever a stranger's program comes up with
            return REFUSED, str(error) or type(error).__name__

    def _template(self, question: Question) -> jinja2.Template:
        number = question["template"]
        if number not in self._templates:
            self._templates[number] = self._environment.from_string(question["source"])
        return self._templates[number]


Limit = Callable[[int, int], None]  # bytes of memory, seconds of processor time


def serve(questions: BinaryIO, answers: BinaryIO, renderer: Renderer, limit: Limit) -> None:
    """Answer until the questions end. `limit` is told what each of them may take."""
    _write(answers, b"")
    while len(header := questions.read(HEADER)) == HEADER:
        length = int.from_bytes(header, "big")
        memory = MEMORY + MEMORY_PER_BYTE * length
        limit(memory, 1)
        try:
            _write(answers, _answer(questions.read(length), renderer, partial(limit, memory)))
        except MemoryError:
            _write(answers, EXHAUSTED)
            return


def _answer(asked: bytes, renderer: Renderer, limit: Callable[[int], None]) -> bytes:
    question: Question = json.loads(asked)
    limit(question["seconds"])
    status, text = renderer.answer(question)
    return status + text.encode("utf-8", "replace")


def _write(answers: BinaryIO, answer: bytes) -> None:
    answers.write(frame(answer))
    answers.flush()


def confine() -> Limit:
    """Give up what rendering doesn't need, for good; returns what sets the limits of one render.

    Only systems with /proc (Linux) limit memory: elsewhere the size of the process isn't known, or, as on
    macOS, the limit isn't kept.
    """
    size = _size()
    for kind in (
        resource.RLIMIT_NOFILE,  # also sockets, pipes, directories; what is open stays open
        resource.RLIMIT_NPROC,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_CORE,
    ):
        resource.setrlimit(kind, (0, 0))
    return _limit(size)


def _size() -> int | None:
    """Bytes of this process's address space, if the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _limit(size: int | None) -> Limit:
    hard_memory = resource.getrlimit(resource.RLIMIT_AS)[1]
    hard_time = resource.getrlimit(resource.RLIMIT_CPU)[1]

    def limit(memory: int, seconds: int) -> None:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_AS, (_lower(size + memory, hard_memory), hard_memory))
        until = int(time.process_time()) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (_lower(until, hard_time), hard_time))

    return limit


def _lower(value: int, hard: int) -> int:
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _import_all(renderer: Renderer) -> None:
    """Have all imported that Jinja and Python import when they need it: no file may be opened then."""
    every = r"{{ '\n\N{BULLET}&amp;' | striptags | wordwrap | pprint }}{{ lipsum() }}"
    sources = (every, "{{ x.y }}", "{% x %}")
    for number, source in enumerate(sources, 1):
        renderer.answer({"template": -number, "source": source, "variables": {}})
    _strftime_now("%c")


def _without_message(kind: type[BaseException], *_: object) -> None:
    """What ends this process goes into a log, and its message may quote a prompt."""
    print(f"The process that renders templates ended: {kind.__name__}.", file=sys.stderr)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which closes standard input
    sys.excepthook = _without_message
    os.environ.clear()  # nothing to find even for a template that gets out of the sandbox
    os.closerange(3, MOST_DESCRIPTORS)
    renderer = Renderer()
    _import_all(renderer)
    serve(sys.stdin.buffer, sys.stdout.buffer, renderer, confine())


if __name__ == "__main__":
    main()
