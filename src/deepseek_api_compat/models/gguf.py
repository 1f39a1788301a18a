"""Reads the header of a GGUF file: what the model is, whether the file is whole, its control tokens.

Format: ggml's `docs/gguf.md`. Everything is little-endian; tensor data is only measured, never read, so
this takes milliseconds for any size of model (the `gguf` package takes seconds for a vocabulary).
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from deepseek_api_compat.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")
# Values that are kept; all others are skipped over. Of an array its place is kept.
_KEPT = {"general.architecture", "general.name", "general.file_type", "general.alignment", "split.count"}
_KEPT |= {"tokenizer.chat_template", "tokenizer.ggml.model"}
_TOKENS, _TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_FIM = tuple(f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid"))
_KEPT.update(_FIM)
_CONTROL, _USER_DEFINED = 3, 4  # llama.h `llama_token_type`

# ggml tensor type -> (weights in a block, bytes in a block); ggml.c `type_traits`.
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110)},
    **{22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8)},
    **{29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18)},
}


class Header(msgspec.Struct, frozen=True):
    """What a GGUF file says about its model.

    file_type: ggml's number of the main quantisation (2: Q4_0, 15: Q4_K_M), or None.
    context_length: tokens it was trained for, or None. split_count: files the model is split into.
    chat_template: Jinja source, or None.
    """

    architecture: str
    name: str
    context_length: int | None
    file_type: int | None
    chat_template: str | None
    tensors: int
    split_count: int = 1


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens of a GGUF file that are not pieces of text. Ids by spelling.

    kind: ggml's name of the tokenizer ("gpt2": byte-level BPE, "llama": SentencePiece), "" if it has none.
    user_defined: such as llama.cpp makes of their spelling in any text, whatever it is told.
    fim: ids of the tokens in front of prefix, suffix and gap of a text to fill in, or None.
    """

    kind: str
    control: dict[str, int]
    user_defined: dict[str, int]
    fim: tuple[int, int, int] | None = None


class _Broken(Exception):
    """Why the bytes are not a GGUF header, in words that end the sentence."""


def inspect(path: Path) -> Header:
    """The header of the file. Raises ModelError if it is no GGUF, damaged, or shorter than it should be."""
    with _reader(path) as reader:
        return reader.header()


def vocabulary(path: Path) -> Vocabulary:
    """The control tokens of the file; some 20 ms for 130,000 tokens. Raises ModelError, as `inspect`."""
    with _reader(path) as reader:
        return reader.vocabulary()


def tokens_digest(path: Path) -> bytes:
    """SHA-256 of the file's tokens and their ids. Raises ModelError, as `inspect`."""
    with _reader(path) as reader:
        return reader.tokens_digest()


@contextmanager
def _reader(path: Path) -> Iterator[_Reader]:
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise _Broken("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield _Reader(data)
    except OSError as error:
        raise ModelError(f"Can't read the model file {path}: {error.strerror}.") from None
    except _Broken as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}.") from None
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, msgspec.ValidationError):
        raise ModelError(f"{path} is not a readable GGUF file: its header is damaged or cut short.") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        tensors, values = self._values()
        end = self._tensor_bytes(tensors)
        alignment = msgspec.convert(values.get("general.alignment", 32), int) or 32
        start = -(-self._at // alignment) * alignment
        whole = start + end if end else self._at
        if len(self._data) < whole:
            raise _Broken(f"it is cut short, {len(self._data):,} of {whole:,} bytes are there")
        return self._as_header(values, tensors)

    def vocabulary(self) -> Vocabulary:
        _, values = self._values()
        places = [msgspec.convert(values.get(key, 0), int) for key in (_TOKENS, _TOKEN_TYPES)]
        found: dict[int, dict[str, int]] = {_CONTROL: {}, _USER_DEFINED: {}}
        if all(places):
            types = self._types(places[1])
            for id, text in self._strings(places[0], {id for id, type in enumerate(types) if type in found}):
                found[types[id]][text] = id
        fim = [values.get(key) for key in _FIM]
        return Vocabulary(
            kind=str(values.get("tokenizer.ggml.model", "")),
            control=found[_CONTROL],
            user_defined=found[_USER_DEFINED],
            fim=None if None in fim else msgspec.convert(fim, tuple[int, int, int]),
        )

    def tokens_digest(self) -> bytes:
        _, values = self._values()
        start = self._at = msgspec.convert(values[_TOKENS], int)
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind != _STRING:
            raise _Broken("its tokens are not strings")
        self._skip_strings(count)
        if self._at > len(self._data):
            raise _Broken("its header is damaged or cut short")
        return hashlib.sha256(self._data[start : self._at]).digest()

    def _values(self) -> tuple[int, dict[str, object]]:
        """The number of tensors, and what is kept of the metadata; then the table of tensors is next."""
        if self._data[:4] != b"GGUF":
            raise _Broken("it does not start with the letters GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise _Broken(f"its format version is {version}, and only 2 and 3 are known")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        return tensors, dict(self._pair() for _ in range(pairs))

    def _as_header(self, values: dict[str, object], tensors: int) -> Header:
        architecture = str(values.get("general.architecture", ""))
        if not architecture:
            raise _Broken("it names no model architecture")
        return msgspec.convert(
            {
                "architecture": architecture,
                "name": str(values.get("general.name", "")),
                "context_length": values.get(f"{architecture}.context_length"),
                "file_type": values.get("general.file_type"),
                "chat_template": values.get("tokenizer.chat_template"),
                "tensors": tensors,
                "split_count": values.get("split.count") or 1,
            },
            Header,
        )

    def _pair(self) -> tuple[str, object]:
        key, kind = self._string(), self._scalar("I")
        if key in _KEPT or key.endswith(".context_length"):
            return key, self._string() if kind == _STRING else self._scalar(_SCALARS[kind])
        place = self._at
        self._skip(kind)
        return key, place if kind == _ARRAY else None

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._skip_strings(1)
        elif kind == _ARRAY:
            kind, count = self._scalar("I"), self._scalar("Q")
            if kind == _STRING:
                self._skip_strings(count)
            else:
                self._at += count * struct.calcsize(_SCALARS[kind])
        else:
            self._at += struct.calcsize(_SCALARS[kind])

    def _skip_strings(self, count: int) -> None:
        # A vocabulary and its merges are a few hundred thousand strings: keep this loop bare.
        data, at, length = self._data, self._at, _U64.unpack_from
        for _ in range(count):
            at += 8 + length(data, at)[0]
        self._at = at

    def _types(self, place: int) -> array[int]:
        self._at = place
        kind, count = self._scalar("I"), self._scalar("Q")
        types = array("i")
        if _SCALARS.get(kind) not in ("i", "I") or types.itemsize != 4:
            raise _Broken("its token types are not 32-bit integers")
        if 4 * count > len(self._data) - self._at:
            raise _Broken("its header is damaged or cut short")
        types.frombytes(self._data[self._at : self._at + 4 * count])
        if sys.byteorder == "big":
            types.byteswap()
        return types

    def _strings(self, place: int, wanted: set[int]) -> Iterator[tuple[int, str]]:
        """Those strings of an array that are wanted, with their index."""
        self._at = place
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind != _STRING:
            raise _Broken("its tokens are not strings")
        last = -1
        for index in sorted(index for index in wanted if index < count):
            self._skip_strings(index - last - 1)
            yield index, self._string()
            last = index

    def _tensor_bytes(self, count: int) -> int:
        """Reads the table of tensors; returns where the last one ends, counted from the start of the data."""
        end = 0
        for _ in range(count):
            self._skip_strings(1)
            weights = 1
            for _ in range(self._scalar("I")):
                weights *= self._scalar("Q")
            kind, offset = self._scalar("I"), self._scalar("Q")
            per_block, size = _BLOCKS.get(kind, (1, 0))  # a type newer than this table: check its offset only
            end = max(end, offset + weights // per_block * size)
        return end

    def _scalar(self, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > len(self._data) - self._at:
            raise _Broken("its header is damaged or cut short")
        text = self._data[self._at : self._at + length].decode()
        self._at += length
        return text
