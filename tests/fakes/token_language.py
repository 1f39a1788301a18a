"""A language in which the ids so far say what comes next, so that any answer can be checked, id by id.

Ids below 256 are the bytes of UTF-8, then there are the control tokens, then words. Words end with a space
and characters of several bytes stand alone, so a text of this language has exactly one spelling in ids.
`LIE` is a word that never comes next: an engine told to lie puts it in, and what follows still follows from
all ids, the lie included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf

USER, SYSTEM, ASSISTANT, END = range(256, 260)
CONTROLS = {"<|user|>": USER, "<|system|>": SYSTEM, "<|assistant|>": ASSISTANT, "<|end|>": END}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
_SYLLABLES = ("ka", "lo", "mi", "nu", "re", "sa", "to", "zu")
WORDS = [*(f"{one} " for one in _SYLLABLES), *(f"{a}{b} " for a in _SYLLABLES for b in _SYLLABLES), "LIE "]
LIE = 260 + len(WORDS) - 1
CHARACTERS = ("é", "日", "🙂")  # no two share a byte
CONTEXT = 4096
_PARTS = re.compile("[é日🙂]|[^ é日🙂]* |[^ é日🙂]+")
_IDS = {word: 260 + at for at, word in enumerate(WORDS)}
_FORCED = {a: b for text in CHARACTERS for a, b in zip(text.encode(), text.encode()[1:], strict=False)}
_ONE_IN_END, _ONE_IN_CHARACTER = 150, 8


class Sequel:
    """What comes next, after all ids that it was fed."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._hash = 0
        self._last = -1
        for id in ids:
            self.feed(id)

    def feed(self, id: int) -> None:
        self._hash = (self._hash * 6364136223846793005 + id + 1442695040888963407) % 2**64
        self._last = id

    def next(self) -> int:
        if self._last in _FORCED:
            return _FORCED[self._last]
        dice = self._hash >> 24
        if dice % _ONE_IN_END == 1:
            return END
        if dice // _ONE_IN_END % _ONE_IN_CHARACTER == 1:
            return CHARACTERS[dice // 4096 % len(CHARACTERS)].encode()[0]
        return 260 + dice // 4096 % (len(WORDS) - 1)


def logprob(id: int) -> float:
    return -(id % 97) / 16


def encode(text: str) -> list[int]:
    """The ids of a text: its words as words, all else as bytes."""
    ids: list[int] = []
    for part in _PARTS.findall(text):
        ids += [_IDS[part]] if part in _IDS else part.encode()
    return ids


def decode(ids: Sequence[int]) -> str:
    """The text of ids, control tokens left out. Half a character at the end is U+FFFD."""
    parts = [b"" if 256 <= id < 260 else bytes([id]) if id < 256 else WORDS[id - 260].encode() for id in ids]
    return b"".join(parts).decode(errors="replace")


def prompt(messages: Sequence[dict[str, str]]) -> list[int]:
    """What `TEMPLATE` makes of messages."""
    ids: list[int] = []
    for message in messages:
        ids += [CONTROLS[f"<|{message['role']}|>"], *encode(message["content"])]
    return [*ids, ASSISTANT]


class Wrong(Exception):
    """An answer that its prompt does not have; says where."""


class Told(NamedTuple):
    """An answer: its text and finish_reason, and the stop strings and limit that it was made with."""

    text: str
    finish: str
    stops: Sequence[str] = ()
    most: int = CONTEXT


def check(ids: Sequence[int], told: Told) -> int:
    """How many tokens the answer to a prompt has, of which each is the right one, or a lie. Raises Wrong."""
    sequel = Sequel(ids)
    text, made, at = told.text, 0, 0
    pending: list[int] = []
    while True:
        if made > told.most:
            raise Wrong(f"over {told.most} tokens")
        if at == len(text) and not pending and told.finish == "length" and made == told.most:
            return made
        next = sequel.next()
        if next == END:
            if at < len(text) or told.finish != "stop":
                raise Wrong(
                    f"ends {told.finish!r} at {at} of {len(text)}, after {text[:at][-40:]!r}: the end is due"
                )
            return made + 1
        shown = decode([*pending, next])
        if shown.endswith("�"):
            pending.append(next)
        elif text.startswith(shown, at):
            pending, at = [], at + len(shown)
        elif not pending and text.startswith("LIE ", at):
            next, at = LIE, at + 4
        else:
            return made + _until_stop(sequel, told, at, pending)
        sequel.feed(next)
        made += 1
        if at < len(text) and pending and told.finish == "length" and made == told.most:
            raise Wrong("text after the last token")
        if at == len(text) and pending and told.finish == "length" and made == told.most:
            return made  # it ends in the middle of a character, which can't be shown
        if any(stop in text[:at] for stop in told.stops):
            raise Wrong("a stop string was sent")


def _until_stop(sequel: Sequel, told: Told, at: int, pending: list[int]) -> int:
    """How many more tokens until a stop string begins where the text ends. Raises Wrong if none does."""
    more = list(pending)
    before = told.text[:at]
    for _ in range(16):
        next = sequel.next()
        if next == END:
            break
        sequel.feed(next)
        more.append(next)
        whole = before + decode(more)
        found = [whole.find(stop) for stop in told.stops if stop in whole]
        if found:
            if told.finish == "stop" and whole[: min(found)] == told.text:
                return len(more) - len(pending)
            break
    raise Wrong(
        f"{told.text[at:][:40]!r} ({told.finish}) at {at} of {len(told.text)} after {before[-40:]!r}, "
        f"where {decode(more)[:60]!r} is due"
    )


def write_model(path: Path) -> Path:
    """A GGUF file that says what the gateway reads of a model: tokens, template, context. No weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Token language")
    writer.add_context_length(CONTEXT)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"<0x{byte:02X}>" for byte in range(256)), *CONTROLS, *WORDS])
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([normal] * 256 + [control] * len(CONTROLS) + [normal] * len(WORDS))
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
