"""What templates make of messages, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import PluginSettings
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.gateway.plugins import Plugin
from deepseek_api_compat.plugins import Context, Refuse
from deepseek_api_compat.plugins.prompt_templates import PromptTemplates

TEMPLATES = {
    "translate": {
        "system": "You translate into {{ language }}{% if tone is defined %}, {{ tone }}{% endif %}.",
        "user": "Translate:\n{{ message }}",
    },
    "house": {"system": "Be kind."},
    "list": {"system": "{% for one in things %}- {{ one.name }}\n{% endfor %}"},
    "loop": {"system": "{% for a in range(n) %}{% for b in range(n) %}x{% endfor %}{% endfor %}"},
    "picky": {"system": "{% if n < 1 %}{{ raise_exception('n is too small') }}{% endif %}{{ 7 // n }}"},
    "wild": {"system": "{{ ''.__class__.__mro__ }}"},
}
HELLO = {"role": "user", "content": "Hello"}


def made(plugin: PromptTemplates | None = None, model: str = "m", **request: Any) -> dict[str, Any]:
    request = {"model": model, "messages": [HELLO], **request}
    context = Context("req", "key", model, False, Path("."))
    return (plugin or PromptTemplates(TEMPLATES)).pre_process(request, context)


def refused(**request: Any) -> Refuse:
    with pytest.raises(Refuse) as caught:
        made(**request)
    assert caught.value.status == 400
    return caught.value


def test_a_system_text_and_a_wrapped_message():
    assert made(template="translate", variables={"language": "French"}) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You translate into French."},
            {"role": "user", "content": "Translate:\nHello"},
        ],
    }


def test_only_the_last_user_message_is_wrapped_and_roles_stay():
    messages = [
        {"role": "system", "content": "Mine."},
        HELLO,
        {"role": "assistant", "content": "Bonjour"},
        {"role": "user", "content": "And you?", "name": "li"},
        {"role": "assistant", "content": "Et", "prefix": True},
    ]
    request = made(template="translate", variables={"language": "French", "tone": "short"}, messages=messages)
    assert request["messages"] == [
        {"role": "system", "content": "You translate into French, short."},
        *messages[:3],
        {"role": "user", "content": "Translate:\nAnd you?", "name": "li"},
        messages[4],
    ]


def test_pictures_stay():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "What "}, picture, "is it?"]
    request = made(
        template="translate", variables={"language": "x"}, messages=[{"role": "user", "content": parts}]
    )
    text = {"type": "text", "text": "Translate:\nWhat is it?"}
    assert request["messages"][1]["content"] == [text, picture]


def test_variables_are_data():
    source = "{{ 7 * 7 }} {% raw %} <b>&</b>"
    request = made(template="translate", variables={"language": source})
    assert request["messages"][0]["content"] == f"You translate into {source}."
    said = made(
        template="translate", variables={"language": "x"}, messages=[{"role": "user", "content": source}]
    )
    assert said["messages"][1]["content"] == f"Translate:\n{source}"


def test_variables_may_be_any_json():
    request = made(template="list", variables={"things": [{"name": "a"}, {"name": 2}]})
    assert request["messages"][0]["content"] == "- a\n- 2\n"


def test_without_a_template_nothing_is_touched():
    assert made() == {"model": "m", "messages": [HELLO]}
    assert made(template=None, variables=None) == {"model": "m", "messages": [HELLO]}


def test_a_models_default():
    plugin = PromptTemplates(TEMPLATES, defaults={"m": "house"})
    assert made(plugin)["messages"] == [{"role": "system", "content": "Be kind."}, HELLO]
    assert made(plugin, model="other")["messages"] == [HELLO]
    chosen = made(plugin, template="translate", variables={"language": "x"})
    assert chosen["messages"][0]["content"] == "You translate into x."


@pytest.mark.parametrize(
    ("request_", "param", "says"),
    [
        ({"template": "none"}, "template", "no template 'none'"),
        ({"template": "n" * 10_000}, "template", "no template"),
        ({"template": ["house"]}, "template", "must be the name"),
        ({"template": "translate", "variables": "French"}, "variables", "must be an object"),
        ({"template": "translate"}, "variables", "'language' is undefined"),
        ({"variables": {}}, "variables", "for a `template`"),
        ({"template": "house", "variables": {"message": "x"}}, "variables", "can't be given"),
        ({"template": "house", "variables": {"x": "y" * (1 << 20)}}, "variables", "longer than"),
        ({"template": "list", "variables": {"things": [{}]}}, "variables", "no attribute 'name'"),
        ({"template": "list", "variables": {"things": 7}}, "variables", "wrong type"),
        ({"template": "picky", "variables": {"n": 0}}, "variables", "n is too small"),
        ({"template": "picky", "variables": {"n": "1"}}, "variables", "wrong type"),
        ({"template": "loop", "variables": {"n": 50_000}}, "variables", "too long"),
        ({"template": "loop", "variables": {"n": 500_000}}, "variables", "wrong type or value"),
        ({"template": "wild"}, "variables", "can't be filled"),
    ],
)
def test_what_is_refused(request_: dict[str, Any], param: str, says: str):
    error = refused(**request_)
    assert error.param == param
    assert says in error.message
    assert len(error.message) < 200


def test_a_wrapping_template_needs_a_user_message():
    error = refused(
        template="translate", variables={"language": "x"}, messages=[{"role": "system", "content": "x"}]
    )
    assert error.param == "messages"


def test_templates_from_files(tmp_path: Path):
    (tmp_path / "brief.system.jinja").write_text("用{{ n }}句话回答。\n", "utf-8")
    (tmp_path / "brief.user.jinja").write_text("{{ message }}（简短）", "utf-8")
    (tmp_path / "README").write_text("{{")
    plugin = PromptTemplates(TEMPLATES, str(tmp_path))
    messages = made(plugin, template="brief", variables={"n": 2})["messages"]
    assert [message["content"] for message in messages] == ["用2句话回答。", "Hello（简短）"]
    assert made(plugin, template="house")["messages"][0]["content"] == "Be kind."
    with pytest.raises(ValueError, match="two texts"):
        PromptTemplates({"brief": {"user": "x"}}, str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"templates": {"a": {}}},
        {"templates": {"a": {"developer": "x"}}},
        {"templates": {"a": {"system": 1}}},
        {"templates": {"a": {"system": "{% if %}"}}},
        {"templates": {"a": {"system": "x"}}, "defaults": {"m": "b"}},
        {"directory": "/nowhere/at/all"},
    ],
)
def test_wrong_options(options: dict[str, Any]):
    use = "deepseek_api_compat.plugins.prompt_templates:PromptTemplates"
    with pytest.raises(ConfigError):
        Plugin(PluginSettings(use=use, options=options))
