"""Messages to prompt text, and parameters to sampling and grammar."""

import json
from datetime import datetime
from typing import Any

import pytest

from deepseek_api_compat.errors import InternalError, InvalidRequest
from deepseek_api_compat.protocol.job import Grammar, Sampling
from deepseek_api_compat.protocol.openai import ChatRequest, DecodeLimits, decode_chat
from deepseek_api_compat.protocol.prompt import (
    grammar_of,
    map_temperature,
    normalise,
    plain,
    render_template,
    repetition_penalty,
    sampling_of,
)

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def request(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return decode_chat(json.dumps(body).encode(), DecodeLimits())


def normal(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return normalise(request(messages=messages).messages)


def render(template: str | None, *messages: dict[str, Any], **options: Any) -> str:
    tools = options.pop("tools", None)
    decoded = request(messages=messages or [{"role": "user", "content": "Hi"}], tools=tools)
    return render_template(
        template, normalise(decoded.messages), bos="<s>", eos="</s>", tools=decoded.tools, **options
    )


def test_normalised_messages_are_plain() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": " c"}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert normal(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": []},
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab c", "name": "ann"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_not_text_is_refused(kind: str) -> None:
    image = {"type": kind, kind: {"url": "data:,"}}
    with pytest.raises(InvalidRequest, match=f"{kind}.*reads text only") as caught:
        normal({"role": "user", "content": "Hi"}, {"role": "user", "content": ["What is this?", image]})
    assert caught.value.param == "messages[1].content"


def test_a_chat_template() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_blocks_are_trimmed_as_transformers_does() -> None:
    template = "{% for m in messages %}\n    {% if true %}\n{{ m.content }};\n    {% endif %}\n{% endfor %}\n"
    assert render(template) == "Hi;\n"


def test_names_that_templates_use() -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ tools is none }}") == "<s></s>True"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{{ thinking }}", kwargs={"thinking": True}) == "True"
    assert render("{{ messages | length }}", kwargs={"messages": []}) == "1"


def test_the_time_is_known_only_if_given() -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}no clock{% endif %}"
    assert render(template) == "no clock"
    assert render(template, now=datetime(2026, 3, 1)) == "01 Mar 2026"


def test_tojson_neither_escapes_html_nor_unicode() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "<é> & '"}}
    assert render("{% for tool in tools %}{{ tool | tojson }}{% endfor %}", tools=[tool]) == (
        '{"type": "function", "function": {"name": "f", "description": "<é> & \'"}}'
    )
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'


@pytest.mark.parametrize(
    ("arguments", "shown"), [('{"x":[1,"é"]}', '{"x": [1, "é"]}'), ("{broken", '"{broken"'), ("[1]", '"[1]"')]
)
def test_arguments_are_parsed_for_templates(arguments: str, shown: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(template, {"role": "assistant", "content": None, "tool_calls": [call]}) == shown


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ missing.name }}", "undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_refuses_names_the_messages(template: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        render(template)
    assert caught.value.param == "messages"


def test_a_template_with_a_syntax_error_is_not_the_clients_fault() -> None:
    with pytest.raises(InternalError, match="chat template is not valid"):
        render("{% for %}")


def test_without_a_template() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    assert render(None, *turns) == plain(turns) == expected


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


def test_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    assert grammar_of(request()) is None
    assert grammar_of(request(response_format={"type": "text"})) is None
    assert grammar_of(request(response_format={"type": "json_object"})) == Grammar({"type": "object"})
    assert grammar_of(request(response_format=wanted)) == Grammar(schema)
