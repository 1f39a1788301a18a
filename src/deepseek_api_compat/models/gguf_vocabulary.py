"""The tokenizer and chat template of a DeepSeek-V3 checkpoint, as a GGUF file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import checkpoint
from deepseek_api_compat.models.v3_config import V3Config

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.h `llama_token_type`
# How DeepSeek-V3's tokenizer cuts text before it merges. llama.cpp knows it as "deepseek-v3".
CUTS = [
    "\\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
# In front of prefix, suffix and gap of a text to fill in.
_FILL_IN = {"pre": "<｜fim▁begin｜>", "suf": "<｜fim▁hole｜>", "mid": "<｜fim▁end｜>"}


class _Pattern(msgspec.Struct):
    regex: str = msgspec.field(name="Regex", default="")


class _Cut(msgspec.Struct):
    type: str
    pattern: _Pattern | None = None


class _Cuts(msgspec.Struct):
    pretokenizers: list[_Cut] = []


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    pre_tokenizer: _Cuts = msgspec.field(default_factory=_Cuts)


class _TokenizerConfig(msgspec.Struct):
    add_bos_token: bool = False


def settings(folder: Path, config: V3Config) -> dict[str, Any]:
    """The keys of the tokenizer and their values. Raises ModelError if the tokenizer isn't DeepSeek-V3's."""
    tokenizer = _read(folder / "tokenizer.json", _Tokenizer)
    cuts = [cut.pattern.regex for cut in tokenizer.pre_tokenizer.pretokenizers if cut.pattern]
    if cuts != CUTS:
        raise ModelError(f"{folder / 'tokenizer.json'} does not cut text as DeepSeek-V3's does.")
    tokens, types = _tokens(folder, tokenizer, config.vocab_size)
    merges = tokenizer.model.merges
    values: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": "deepseek-v3",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "ggml.bos_token_id": config.bos_token_id,
        "ggml.eos_token_id": config.eos_token_id,
        "ggml.add_bos_token": _read(folder / "tokenizer_config.json", _TokenizerConfig).add_bos_token,
    }
    ids = {added.content: added.id for added in tokenizer.added_tokens}
    for part, token in _FILL_IN.items():
        if token in ids:
            values[f"ggml.fim_{part}_token_id"] = ids[token]
    template = checkpoint.read(folder).chat_template
    if template is not None:
        values["chat_template"] = template
    return {f"tokenizer.{key}": value for key, value in values.items()}


def _tokens(folder: Path, tokenizer: _Tokenizer, count: int) -> tuple[list[str], list[int]]:
    """Spelling and type of each id. The model has more ids than the tokenizer has tokens."""
    highest = max([*tokenizer.model.vocab.values(), *(added.id for added in tokenizer.added_tokens)])
    if highest >= count:
        raise ModelError(f"{folder / 'tokenizer.json'} has the id {highest}, and the model only {count} ids.")
    tokens, types = [f"[PAD{id}]" for id in range(count)], [_UNUSED] * count
    for text, id in tokenizer.model.vocab.items():
        tokens[id], types[id] = text, _NORMAL
    for added in tokenizer.added_tokens:
        control = added.special or added.content.startswith("<｜")
        tokens[added.id], types[added.id] = added.content, _CONTROL if control else _USER_DEFINED
    return tokens, types


def _read(path: Path, type: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type)
    except OSError as error:
        raise ModelError(f"Can't read {path}: {error.strerror}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"Can't make sense of {path}: {error}.") from None
