"""DeepSeek's real tokenizers, from the catalogue."""

from __future__ import annotations

import pytest

from deepseek_api_compat.models import catalogue, prepared
from deepseek_api_compat.protocol.tokenizer import V41_TOKENS, Tokenizer


@pytest.fixture(scope="session")
def v3_tokenizer() -> Tokenizer:
    return Tokenizer(prepared.pull(catalogue.find("deepseek-v3-tokenizer")))


@pytest.fixture(scope="session")
def v4_tokenizer() -> Tokenizer:
    return Tokenizer(prepared.pull(catalogue.find("deepseek-v4-tokenizer")))


@pytest.fixture(scope="session")
def v41_tokenizer() -> Tokenizer:
    return Tokenizer(prepared.pull(catalogue.find("deepseek-v4-tokenizer")), V41_TOKENS)


@pytest.fixture(scope="session")
def tokenizer_of(
    v3_tokenizer: Tokenizer, v4_tokenizer: Tokenizer, v41_tokenizer: Tokenizer
) -> dict[str, Tokenizer]:
    v3_family = dict.fromkeys(("v3", "v3-tools", "r1", "v3.1", "v3.2"), v3_tokenizer)
    return {**v3_family, "v4": v4_tokenizer, "v4.1": v41_tokenizer}
