"""What engines see of personal data, and that clients see it again however the answer is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import PluginSettings
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.gateway.plugins import Plugin
from deepseek_api_compat.plugins import Context, Event, Finish, Reasoning, Text, ToolCall, Usage
from deepseek_api_compat.plugins.pii import PiiMasking

MAIL, PHONE, CARD = "li.si@example.com", "138 1234 5678", "4111 1111 1111 1111"


def context() -> Context:
    return Context("req", "key", "m", True, Path("."))


def masked(*messages: Any, plugin: PiiMasking | None = None, **more: Any) -> tuple[dict[str, Any], Context]:
    seen = context()
    request = {"model": "m", "messages": list(messages), **more}
    return (plugin or PiiMasking()).pre_process(request, seen), seen


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answered(seen: Context, events: Sequence[Event]) -> list[Event]:
    plugin = PiiMasking()
    made: list[Event] = []
    for event in events:
        given = plugin.on_event(event, seen)
        made += [event] if given is None else given
    return made


def text_of(events: Sequence[Event], kind: Any = Text, index: int = 0) -> str:
    return "".join(one.text for one in events if isinstance(one, kind) and one.index == index)


def test_all_text_of_messages_is_masked():
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": f'{{"to": "{MAIL}"}}'}}
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a@b.com.png"}}
    request, _ = masked(
        {"role": "system", "content": f"You are for {MAIL}.", "name": PHONE},
        user([{"type": "text", "text": f"call {PHONE}"}, f"or {CARD}", picture]),
        {"role": "assistant", "content": None, "reasoning_content": f"{CARD}?", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": f"sent to {MAIL} and new@example.com"},
        user=MAIL,
    )
    system, asked, assistant, tool = request["messages"]
    assert system == {"role": "system", "content": "You are for <EMAIL_1>.", "name": "<PHONE_1>"}
    assert asked["content"] == [{"type": "text", "text": "call <PHONE_1>"}, "or <BANK_CARD_1>", picture]
    assert assistant["reasoning_content"] == "<BANK_CARD_1>?"
    made = assistant["tool_calls"][0]
    assert (made["id"], made["function"]["name"]) == ("c", "send")
    assert json.loads(made["function"]["arguments"]) == {"to": "<EMAIL_1>"}
    assert tool == {
        "role": "tool",
        "tool_call_id": "c",
        "content": "sent to <EMAIL_1> and <EMAIL_2>",
    }
    assert request["user"] == "<EMAIL_1>"


def test_a_longer_conversation_begins_as_the_shorter_one():
    first = user(f"I am {MAIL}, {PHONE}")
    earlier, _ = masked(first)
    later, _ = masked(first, {"role": "assistant", "content": f"Hello {MAIL}"}, user("new@example.com"))
    assert later["messages"][0] == earlier["messages"][0]
    assert later["messages"][1]["content"] == "Hello <EMAIL_1>"
    assert later["messages"][2]["content"] == "<EMAIL_2>"


def test_arguments_stay_json():
    def arguments(text: str) -> str:
        call = {"function": {"name": "f", "arguments": text}}
        request, _ = masked({"role": "assistant", "tool_calls": [call]})
        return str(request["messages"][0]["tool_calls"][0]["function"]["arguments"])

    assert json.loads(arguments('{"n": 13812345678, "ok": true, "x": 1.5}')) == {
        "n": "<PHONE_1>",
        "ok": True,
        "x": 1.5,
    }
    escaped = json.dumps({"说": f"电话１{PHONE[1:]}"})  # in \\u escapes
    assert json.loads(arguments(escaped)) == {"说": "电话<PHONE_1>"}
    assert arguments('{"a":1,  "b":"x"}') == '{"a":1,  "b":"x"}'
    assert arguments(f"not JSON: {MAIL}") == "not JSON: <EMAIL_1>"
    assert arguments("[" * 100_000 + MAIL).endswith("<EMAIL_1>")


@pytest.mark.parametrize(
    ("written", "made"),
    [
        ("<EMAIL_1>", "<XEMAIL_1>"),
        ("<xemail_7", "<XXEMAIL_1>"),
        (r"\u003cEMAIL_1", "<XEMAIL_1>"),
        ("EMAIL_1 <EMAIL>", "<EMAIL_1>"),
    ],
)
def test_what_the_client_wrote_is_no_placeholder(written: str, made: str):
    request, seen = masked(user(f"{written} {MAIL}"))
    content = request["messages"][0]["content"]
    assert content == f"{written} {made}"
    assert text_of(answered(seen, [Text(0, content), Finish(0, "stop")])) == f"{written} {MAIL}"


def test_an_answer_turns_back_character_by_character():
    _, seen = masked(user(f"{MAIL} {PHONE}"))
    said = "To <EMAIL_1>: <<PHONE_1>, <PHONE_2> <EMAIL_11>, a < b <EMAIL_"
    made = answered(seen, [*(Text(0, one) for one in said), Finish(0, "stop")])
    assert text_of(made) == f"To {MAIL}: <{PHONE}, <PHONE_2> <EMAIL_11>, a < b <EMAIL_"
    assert made[-1] == Finish(0, "stop")


def test_any_cut_gives_the_same_answer():
    _, seen = masked(user(f"{MAIL} {PHONE} {CARD}"))
    said = "<EMAIL_1><PHONE_1> <BANK_CARD_1<EMAIL_1> \\<EMAIL_1>" * 3
    whole = text_of(answered(seen, [Text(0, said), Finish(0, "stop")]))
    assert whole == f"{MAIL}{PHONE} <BANK_CARD_1{MAIL} \\{MAIL}" * 3
    chance = random.Random(7)
    for _ in range(200):
        cuts = sorted(chance.sample(range(len(said) + 1), 12))
        pieces = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
        assert text_of(answered(seen, [*(Text(0, one) for one in pieces), Finish(0, "stop")])) == whole


def test_only_what_may_become_a_placeholder_is_held_back():
    _, seen = masked(user(MAIL))
    plugin = PiiMasking()
    assert plugin.on_event(Text(0, "so a <"), seen) == [Text(0, "so a ")]
    assert plugin.on_event(Text(0, "b> <EMA"), seen) == [Text(0, "<b> ")]
    assert plugin.on_event(Text(0, "IL_"), seen) == []
    assert plugin.on_event(Text(0, "X more"), seen) == [Text(0, "<EMAIL_X more")]
    assert plugin.on_event(Text(0, "<EMAIL_1>"), seen) == [Text(0, MAIL)]


def test_choices_reasoning_and_tool_calls_are_texts_of_their_own():
    _, seen = masked(user(f"{MAIL} and C:\\staff\\{MAIL}"))
    events = [
        Reasoning(0, "is it <EMA"),
        Text(1, "<EM"),
        Text(0, "IL_1> <EMAIL_1"),
        ToolCall(0, 0, "c", "send", ""),
        ToolCall(0, 0, arguments='{"to": "<EMAIL'),
        ToolCall(0, 1, "d", "send", '{"to": "\\u003cEMAIL_1'),
        ToolCall(0, 0, arguments='_1>"}'),
        ToolCall(0, 1, arguments='\\u003e"}'),
        Text(1, "AIL_1>"),
        Finish(0, "tool_calls"),
        Finish(1, "stop"),
        Usage(1, 0, 1),
    ]
    made = answered(seen, events)
    assert text_of(made, Reasoning) == "is it <EMA"
    assert made[0:2] == [Reasoning(0, "is it "), Reasoning(0, "<EMA")]
    assert text_of(made) == "IL_1> <EMAIL_1"
    assert text_of(made, index=1) == MAIL
    for number in (0, 1):
        calls = [one for one in made if isinstance(one, ToolCall) and one.call_index == number]
        assert calls[0].name == "send"
        assert json.loads("".join(one.arguments for one in calls)) == {"to": MAIL}
    assert made[-1] == Usage(1, 0, 1)


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}])
def test_originals_are_escaped_in_an_answer_that_is_json(form: dict[str, Any]):
    secret = "-----BEGIN PRIVATE KEY-----\nMIIabc\n-----END PRIVATE KEY-----"
    _, seen = masked(user(secret), response_format=form)
    made = answered(seen, [Text(0, '{"key": "<SECRET_1>"}'), Finish(0, "stop")])
    assert json.loads(text_of(made)) == {"key": secret}
    _, seen = masked(user(secret), response_format={"type": "text"})
    assert text_of(answered(seen, [Text(0, "<SECRET_1>"), Finish(0, "stop")])) == secret


def test_originals_are_escaped_in_arguments():
    plugin = PiiMasking([], {"path": r'"[^"]*"'})
    _, seen = masked(user('open "C:\\new 文件"'), plugin=plugin)
    made = answered(seen, [ToolCall(0, 0, "c", "open", '{"path": "<PATH_1>"}'), Finish(0, "tool_calls")])
    assert isinstance(made[0], ToolCall)
    assert json.loads(made[0].arguments) == {"path": '"C:\\new 文件"'}


def test_without_personal_data_nothing_is_touched():
    request, seen = masked(user("hello"))
    assert request["messages"] == [user("hello")]
    assert PiiMasking().on_event(Text(0, "<EMAIL_1>"), seen) is None


def test_one_way():
    plugin = Plugin(
        PluginSettings(use="deepseek_api_compat.plugins.pii:PiiMasking", options={"reverse": False})
    )
    assert plugin.each is None
    assert plugin.before is not None


@pytest.mark.parametrize(
    "options", [{"kinds": ["face"]}, {"kinds": []}, {"patterns": {"a": "("}}, {"more": 1}]
)
def test_wrong_options(options: dict[str, Any]):
    with pytest.raises(ConfigError):
        Plugin(PluginSettings(use="deepseek_api_compat.plugins.pii:PiiMasking", options=options))


def test_thousands_of_placeholders():
    mails = " ".join(f"u{number}@example.com" for number in range(3000))
    request, seen = masked(user(mails))
    content = request["messages"][0]["content"]
    assert content.endswith(" <EMAIL_3000>")
    assert text_of(answered(seen, [Text(0, content), Finish(0, "stop")])) == mails
