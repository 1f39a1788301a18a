"""Messages to plain form, and parameters to sampling and grammar."""

import json
from typing import Any

import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.job import Sampling
from deepseek_api_compat.protocol.openai import ChatRequest, DecodeLimits, decode_chat
from deepseek_api_compat.protocol.prompt import (
    map_temperature,
    normalise,
    plain,
    repetition_penalty,
    sampling_of,
)


def request(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return decode_chat(json.dumps(body).encode(), DecodeLimits())


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def normal(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return normalise(request(messages=messages).messages)


def test_normalised_messages_are_plain() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": " c"}]
    assert normal(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": []},
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab c", "name": "ann"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("kind", "value"),
    [("image_url", {"url": "data:,"}), ("input_audio", {"data": "AA==", "format": "wav"}), ("file", {})],
)
def test_what_is_not_text_is_refused(kind: str, value: dict[str, str]) -> None:
    image = {"type": kind, kind: value}
    with pytest.raises(InvalidRequest, match=f"{kind}.*reads text only") as caught:
        normal({"role": "user", "content": "Hi"}, {"role": "user", "content": ["What is this?", image]})
    assert caught.value.param == "messages[1].content"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Hi", "prefix": True},
        {"role": "assistant", "content": "", "prefix": True, "tool_calls": [CALL]},
    ],
)
def test_only_text_of_an_assistant_can_be_continued(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="can be continued") as caught:
        normal({"role": "user", "content": "Hi"}, message)
    assert caught.value.param == "messages[1].prefix"


def test_only_the_last_message_can_be_continued() -> None:
    with pytest.raises(InvalidRequest, match="only a last assistant message"):
        normal({"role": "assistant", "content": "So", "prefix": True}, {"role": "user", "content": "Hi"})


def test_a_reminder_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="only DeepSeek V4"):
        normal({"role": "latest_reminder", "content": "Hi"})


def test_without_a_template() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert plain(turns) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"


def test_sampling_defaults_are_openais() -> None:
    assert sampling_of(request(), temperature_mapping=False) == Sampling(1.0, 1.0, 0.0, 0.0, None, {})
    given = request(
        temperature=0, top_p=0.5, presence_penalty=1, frequency_penalty=-1, seed=0, logit_bias={"7": -100}
    )
    assert sampling_of(given, temperature_mapping=False) == Sampling(0.0, 0.5, 1.0, -1.0, 0, {7: -100.0})


@pytest.mark.parametrize(
    ("asked", "used"), [(0, 0), (0.5, 0.15), (1, 0.3), (1.001, 0.301), (1.3, 0.6), (2, 1.3)]
)
def test_temperature_mapping_of_the_hosted_service(asked: float, used: float) -> None:
    assert map_temperature(asked) == pytest.approx(used)
    assert sampling_of(request(temperature=asked), temperature_mapping=True).temperature == pytest.approx(
        used
    )
    assert sampling_of(request(temperature=asked), temperature_mapping=False).temperature == asked


def test_temperature_mapping_applies_to_the_default() -> None:
    assert sampling_of(request(), temperature_mapping=True).temperature == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("presence", "frequency", "penalty"),
    [
        (0, 0, 1),
        (1, 0, 20 / 19),
        (2, 0, 20 / 18),
        (2, 2, 1.25),
        (-2, 0, 20 / 22),
        (-2, -2, 20 / 24),
        (1, -1, 1),
    ],
)
def test_repetition_penalty(presence: float, frequency: float, penalty: float) -> None:
    assert repetition_penalty(presence, frequency) == pytest.approx(penalty)


@pytest.mark.parametrize("presence", [-2, -0.5, 0, 0.5, 2])
def test_repetition_penalty_equals_the_additive_one_at_the_reference_logit(presence: float) -> None:
    assert 20 / repetition_penalty(presence, 0) == pytest.approx(20 - presence)
