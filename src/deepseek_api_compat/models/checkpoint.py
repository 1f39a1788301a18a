"""What the files of a model say of it: a GGUF file, or a folder as Hugging Face lays it out.

The folder's files are config.json, chat_template.jinja or tokenizer_config.json, and tokenizer.json.
Weights are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import gguf
from deepseek_api_compat.protocol.deepseek.detect import detect

T = TypeVar("T")

# User-defined tokens of some vocabularies (Gemma's, for one) that stand for text and nothing else.
_HTML = re.compile(
    "</?(a|b|big|blockquote|br|caption|center|code|d[dlt]|del|div|em|font|h[1-6]|hr|i|img|ins|kbd|li|ol|p|pre|q|s"
    "|small|span|strike|strong|su[bp]|table|tbody|td|tfoot|th|thead|tr|tt|u|ul|var)/?>",
    re.IGNORECASE,
)
_BRACKETS = {"<": ">", "[": "]", "｜": "｜"}


class Checkpoint(msgspec.Struct, frozen=True):
    """One model's files.

    architecture: as the files name it. context: tokens it was trained for, or None. chat_template: Jinja
    source, or None. controls: ids of the control tokens, by spelling. eager: those that an engine on these
    files makes of their spelling even in plain text. fim: see `gguf.Vocabulary`. format: how the model's
    prompts are written, one of DeepSeek's or "template"; why: a clause that says what tells.
    """

    architecture: str
    context: int | None
    chat_template: str | None
    controls: dict[str, int]
    eager: list[str]
    fim: tuple[int, int, int] | None
    format: str
    why: str


def read(path: Path) -> Checkpoint:
    """What a GGUF file, or a folder with a config.json, says of its model. Raises ModelError."""
    return _folder(path) if path.is_dir() else _gguf(path)


def _gguf(path: Path) -> Checkpoint:
    header, vocabulary = gguf.inspect(path), gguf.vocabulary(path)
    user_defined = {text: id for text, id in vocabulary.user_defined.items() if _is_markup(text)}
    controls = {text: id for text, id in vocabulary.control.items() if text} | user_defined
    # llama.cpp's SentencePiece merges pieces into whatever the vocabulary has, control tokens too.
    eager = controls if vocabulary.kind == "llama" else user_defined
    found = detect(
        chat_template=header.chat_template, architecture=header.architecture, controls=controls.keys()
    )
    return Checkpoint(
        architecture=header.architecture,
        context=header.context_length,
        chat_template=header.chat_template,
        controls=controls,
        eager=list(eager),
        fim=vocabulary.fim,
        format=found.format,
        why=found.why,
    )


def _is_markup(text: str) -> bool:
    """Does a user-defined token mark something, rather than stand for text (blanks, HTML)?"""
    if len(text) < 3 or _BRACKETS.get(text[0]) != text[-1]:
        return False
    return any(map(str.isalpha, text)) and not _HTML.fullmatch(text)


class _Config(msgspec.Struct):
    model_type: str = ""
    architectures: list[str] | None = None
    max_position_embeddings: int | None = None


class _Named(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_Named] | None = None


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_Added] = []


def _folder(path: Path) -> Checkpoint:
    config = _json(path / "config.json", _Config)
    if config is None:
        raise ModelError(f"{path} has no config.json; it is not the folder of a model.")
    tokenizer = _json(path / "tokenizer.json", _Tokenizer) or _Tokenizer()
    controls = {
        token.content: token.id
        for token in tokenizer.added_tokens
        if token.special or _is_markup(token.content)
    }
    template = _chat_template(path)
    architecture = config.model_type or (config.architectures or [""])[0]
    found = detect(chat_template=template, architecture=architecture, controls=controls.keys())
    return Checkpoint(
        architecture=architecture,
        context=config.max_position_embeddings,
        chat_template=template,
        controls=controls,
        eager=[],
        fim=None,
        format=found.format,
        why=found.why,
    )


def _chat_template(folder: Path) -> str | None:
    """From its own file, where newer versions of transformers keep it, or from the tokenizer's settings."""
    own = folder / "chat_template.jinja"
    if (data := _bytes(own)) is not None:
        return data.decode(errors="replace")
    config = _json(folder / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    if isinstance(config.chat_template, list):
        named: Mapping[str, str] = {one.name: one.template for one in config.chat_template}
        return named.get("default")
    return config.chat_template


def _json(path: Path, type: type[T]) -> T | None:
    """The file, or None if there is none. Raises ModelError for one that can't be read."""
    data = _bytes(path)
    try:
        return None if data is None else msgspec.json.decode(data, type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"Can't make sense of {path}: {error}.") from None


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"Can't read {path}: {error.strerror}.") from None
