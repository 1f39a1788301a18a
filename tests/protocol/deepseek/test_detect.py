"""Formats told apart by chat templates, architectures and tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.sandbox import SandboxedEnvironment

from deepseek_api_compat.protocol.deepseek import detect as module
from deepseek_api_compat.protocol.deepseek import render
from deepseek_api_compat.protocol.deepseek.detect import DSML, REQUIRED, SYSTEM, detect, missing, unmet
from deepseek_api_compat.protocol.deepseek.segments import ASSISTANT, BOS, EOS, SEP, THINK, THINK_END, USER
from deepseek_api_compat.protocol.openai import DecodeLimits, decode_chat

TEMPLATES = Path(__file__).parents[2] / "golden" / "templates"
FORMATS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}
EXPECTED = {name: name for name in FORMATS} | {"r1-0528": "r1", "chatml": "template"}
ALL = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END, SEP, DSML, SYSTEM)
V3_TOKENS = (BOS, EOS, USER, ASSISTANT, SEP)
DISTILLED = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END)


def one_line(template: str) -> str:
    """As tokenizer_config.json has them: no line breaks, no signs for white space."""
    return re.sub(r"\n\s*", "", template).replace("{%-", "{%").replace("-%}", "%}")


def indented(template: str) -> str:
    """As conversions re-format them."""
    return template.replace("{%-", "\n    {%-").replace("{{", "\n        {{-").replace("+", "\n    +")


def double_quotes(template: str) -> str:
    return template.replace("'", '"')


@pytest.mark.parametrize("change", [str, one_line, indented, double_quotes])
@pytest.mark.parametrize("name", FORMATS)
def test_by_template(name: str, change: Callable[[str], str]) -> None:
    assert detect(chat_template=change(FORMATS[name]), controls=ALL).format == EXPECTED[name]
    assert detect(chat_template=change(FORMATS[name])).format == EXPECTED[name]


def test_every_format_has_a_template_here() -> None:
    assert set(EXPECTED.values()) == {*REQUIRED, "template"}


@pytest.mark.parametrize(
    ("name", "variant"), [("v3", None), ("v3-0324", "0324"), ("r1", None), ("v3.1", None), ("v3.2", None)]
)
@pytest.mark.parametrize("thinking", [False, True])
def test_those_templates_write_what_the_format_is(name: str, variant: str | None, thinking: bool) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    body = {"model": "m", "messages": messages, "thinking": thinking}
    request = decode_chat(json.dumps(body).encode(), DecodeLimits())
    prompt = "".join(segment.text for segment in render(name.partition("-")[0], variant, request))
    template = SandboxedEnvironment().from_string(FORMATS[name])
    variables = {"messages": messages, "thinking": thinking, "bos_token": BOS, "add_generation_prompt": True}
    assert template.render(variables) == prompt


def test_r1s_first_template_was_v3s() -> None:
    assert detect(chat_template=FORMATS["v3"], controls=V3_TOKENS).format == "v3"
    assert detect(chat_template=FORMATS["v3"], controls=[*V3_TOKENS, THINK, THINK_END]).format == "v3"
    assert detect(chat_template=FORMATS["v3"], controls=DISTILLED).format == "r1"


@pytest.mark.parametrize("format", REQUIRED)
def test_a_model_that_lacks_a_token_of_the_format(format: str) -> None:
    for token in REQUIRED[format]:
        rest = [one for one in ALL if one != token]
        found = detect(chat_template=FORMATS[format], controls=rest)
        assert found.format == "template"
        assert found.why.endswith(f", but the vocabulary has no {token}")
        assert missing(format, rest) == [token]
        assert f"no control token {token}, which the format {format} needs" in unmet(format, rest)
    assert unmet(format, ALL) == ""


@pytest.mark.parametrize(
    ("architecture", "controls", "format"),
    [
        ("deepseek_v3", (), "v3"),
        ("DeepseekV3ForCausalLM", ALL[:7], "v3"),
        ("deepseek2", V3_TOKENS, "v3"),
        ("deepseek2", (), "template"),  # V2 or V3
        ("deepseek_v2", ("<|fim|>",), "template"),
        ("deepseek_v32", (), "v3.2"),
        ("DeepseekV32ForCausalLM", ALL[:7], "v3.2"),
        ("deepseek_v4", (), "v4"),
        ("DeepseekV4ForCausalLM", ALL[:8], "v4"),
        ("DeepseekV4ForCausalLM", ALL, "v4.1"),
        ("deepseek_v41", (), "v4.1"),
        ("", ALL[:8], "v4"),
        ("llama", ("<s>", "</s>"), "template"),
        ("deepseek_v32000", (), "template"),
        ("", (), "template"),
    ],
)
def test_without_a_template(architecture: str, controls: tuple[str, ...], format: str) -> None:
    found = detect(chat_template=None, architecture=architecture, controls=controls)
    assert found.format == format
    assert "it has no chat template" in found.why


def test_a_template_is_heard_before_the_architecture() -> None:
    """V3.2-Exp: V3.2's architecture and V3.1's template."""
    found = detect(chat_template=FORMATS["v3.1"], architecture="deepseek_v32", controls=ALL)
    assert found.format == "v3.1"


def test_v4_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for format in ("v4", "v4.1"):
        assert "pip install 'deepseek-api-compat[formats]'" in unmet(format, ALL)
    assert unmet("v3.2", ALL) == ""
    assert unmet("template", ()) == ""
