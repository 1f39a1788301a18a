"""Prompts as llama.cpp's token ids: for DeepSeek's vocabulary those of DeepSeek's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.llamacpp import LlamaCpp, with_files
from deepseek_api_compat.engines.readiness import ready
from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.deepseek import render
from deepseek_api_compat.protocol.deepseek.segments import BOS, EOS, THINK, THINK_END, USER
from deepseek_api_compat.protocol.openai import DecodeLimits, decode_chat, decode_completion
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.tokenizer import Tokenizer
from fakes.engines import served
from fakes.tiny_gguf import write_sentencepiece

pytestmark = pytest.mark.embedded

V3_FAMILY = ("v3", "v3-tools", "r1", "v3.1", "v3.2")
GOLDEN = Path(__file__).parents[1] / "golden" / "prompts.jsonl"


@pytest.fixture(scope="session")
def tokenizer(v3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(v3_tokenizer_path)


def golden_prompts() -> list[list[Segment]]:
    prompts = []
    for line in GOLDEN.read_bytes().splitlines():
        record = json.loads(line)
        if record["format"] not in V3_FAMILY or record["prompt"] is None:
            continue
        fields = {"model": "m", **record["request"]}
        decode = decode_completion if "prompt" in fields else decode_chat
        request = decode(json.dumps(fields).encode(), DecodeLimits())
        functions = [tool["function"] for tool in fields["tools"]] if fields.get("tools") else None
        prompts.append(render(record["format"], record.get("variant"), request, functions))
    return prompts


async def test_golden_prompts(deepseek_engine: LlamaCpp, tokenizer: Tokenizer) -> None:
    """Every second one; they include texts that spell control tokens."""
    prompts = golden_prompts()
    assert len(prompts) == 755
    differ = [
        "".join(segment.text for segment in prompt)
        for prompt in prompts[::2]
        if await deepseek_engine.encode(prompt) != tokenizer.encode(prompt)
    ]
    assert differ == []


# Scripts, marks, digits and white space that pre-tokenizers tell apart, and what markup is made of.
ALPHABET = "abcXYZ 漢字ひカ한éü\u0301\u200d😀👩🇩🇪אש٣٤กา09\n\r\t\u3000\xa0!?.,'\"`~_<>|｜▁/{}\x00\ue000𝔘"
SPELLINGS = ["<think>", "</think>", "<thi", "nk>", "think", "<｜User｜>", "<｜tool▁sep｜>", "<|EOT|>"]
characters = st.sampled_from([*ALPHABET, *SPELLINGS]) | st.characters(exclude_categories=["Cs"])
texts = st.lists(characters, max_size=30)
drawn = st.tuples(texts, texts, texts).map(lambda lists: ["".join(one) for one in lists])


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(texts=drawn)
async def test_any_text(deepseek_engine: LlamaCpp, tokenizer: Tokenizer, texts: list[str]) -> None:
    first, second, third = (Segment(text, False) for text in texts)
    prompt = [Segment(BOS, True), first, second, Segment(THINK, True), Segment(USER, True), third]
    assert await deepseek_engine.encode(prompt) == tokenizer.encode(prompt)
    assert await deepseek_engine.tokenize(texts[0], special=False) == tokenizer.encode_text(texts[0])


async def test_a_control_token_that_the_model_lacks_is_text(deepseek_engine: LlamaCpp) -> None:
    prompt = [Segment("a", False), Segment("<｜System｜>", True), Segment("b", False)]
    assert await deepseek_engine.encode(prompt) == await deepseek_engine.tokenize(
        "a<｜System｜>b", special=False
    )
    assert await deepseek_engine.encode([]) == []


async def test_an_engine_of_which_nothing_is_known(deepseek_endpoint: Endpoint, tokenizer: Tokenizer) -> None:
    """It is asked; but it doesn't tell control tokens that it makes of any text."""
    stranger = LlamaCpp(deepseek_endpoint)
    prompt = [Segment(text, True) for text in (BOS, USER, "<｜System｜>")]
    plain = tokenizer.encode_text("<｜System｜>")
    for _ in range(2):
        assert await stranger.encode(prompt) == [0, tokenizer.controls[USER], *plain]
    await stranger.close()


async def test_what_its_files_say(deepseek_endpoint: Endpoint, deepseek_model: Path, tmp_path: Path) -> None:
    stranger = LlamaCpp(deepseek_endpoint)
    info = await ready(stranger)
    known = with_files(info, deepseek_model)
    assert (known.format, known.bos, known.eos) == ("v3.1", BOS, EOS)
    assert known.context == info.context
    assert known.chat_template == f"{info.chat_template}\n"
    assert known.controls[USER] == 128803
    assert known.eager == [THINK, THINK_END]
    with pytest.raises(EngineFailed, match="No such file"):
        with_files(info, tmp_path / "gone.gguf")
    await stranger.close()


@pytest.fixture
def sentencepiece_model(tmp_path: Path) -> Path:
    return write_sentencepiece(tmp_path / "sentencepiece.gguf")


async def test_sentencepiece_merges_no_text_into_a_control_token(sentencepiece_model: Path) -> None:
    with served(sentencepiece_model, slots=1, context=64) as endpoint:
        stranger = LlamaCpp(endpoint)
        known = with_files(await stranger.info(), sentencepiece_model)
        engine = LlamaCpp(endpoint, known=known)
        end = known.controls["</s>"]
        assert end in await stranger.tokenize("a</s>b", special=False)  # llama.cpp's own way
        ids = await engine.tokenize("a</s>b", special=False)
        assert end not in ids
        assert await engine.detokenize(ids) == " a</s >b"  # a space in front of each string, as always
        # What is written in segments has the ids of the whole string.
        prompt = [Segment("<s>", True), Segment("a", False), Segment("</s>", True), Segment("b", False)]
        assert await engine.encode(prompt) == await engine.tokenize("<s>a</s>b", special=True)
        # llama.cpp tells a template of its own where the model has none.
        assert (known.chat_template, known.format) == (None, "template")
        await stranger.close()
        await engine.close()
