"""DeepSeek's tokenizers: segments to token ids, and ids back to text as they come.

Reads a `tokenizer.json` with the package `tokenizers`, which is imported when the first one is loaded.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from itertools import chain, groupby
from pathlib import Path

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.protocol.segment import Segment

# V4's file has a placeholder where V4.1 has its system token.
V41_TOKENS: Mapping[int, str] = {128799: "<｜System｜>"}


class Tokenizer:
    """A byte-level BPE tokenizer. Loading takes about a quarter of a second; safe to share among threads.

    `renamed` gives control tokens, by id, another spelling than the file does. Raises ModelError when the
    file can't be read or is of another kind.
    """

    def __init__(self, path: Path, renamed: Mapping[int, str] | None = None) -> None:
        import tokenizers

        try:
            self._full = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{path} is not a tokenizer that can be read: {error}.") from None
        if not isinstance(self._full.decoder, tokenizers.decoders.ByteLevel):
            raise ModelError(f"{path} is not a byte-level tokenizer, as DeepSeek's are.")
        # Without added tokens, so that no text can spell one.
        self._plain = tokenizers.Tokenizer(self._full.model)
        self._plain.normalizer = self._full.normalizer
        self._plain.pre_tokenizer = self._full.pre_tokenizer
        spellings = {id: token.content for id, token in self._full.get_added_tokens_decoder().items()}
        spellings.update(renamed or {})
        self.controls: Mapping[str, int] = {text: id for id, text in spellings.items()}
        self._bytes = {id: text.encode() for id, text in spellings.items()}

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Token ids. Text between two control tokens is encoded as one, so that framing merges with it.

        Raises ModelError for a control token that this tokenizer doesn't have.
        """
        ids: list[int] = []
        for special, run in groupby(segments, key=lambda segment: segment.special):
            if special:
                ids += [self._control(segment.text) for segment in run]
            else:
                ids += self.encode_text("".join(segment.text for segment in run))
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; the spelling of a control token is text like any other."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def detokeniser(self) -> Detokeniser:
        return Detokeniser(self)

    def bytes_of(self, id: int) -> bytes:
        """What the token stands for, maybe a part of a character; nothing for an id that isn't in use."""
        known = self._bytes.get(id)
        if known is None:
            token = self._full.id_to_token(id)
            known = self._bytes[id] = b"" if token is None else bytes(map(_BYTES.__getitem__, token))
        return known

    def _control(self, text: str) -> int:
        try:
            return self.controls[text]
        except KeyError:
            raise ModelError(f"The tokenizer has no token {text}; it belongs to another model.") from None


class Detokeniser:
    """Turns ids into text as they come; a character that isn't complete yet is held back.

    The sum of what it returns is what decoding all ids at once gives: bytes that can't be UTF-8 become
    U+FFFD there and here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, ids)))

    def close(self) -> str:
        """The rest: U+FFFD where a character was left incomplete."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
