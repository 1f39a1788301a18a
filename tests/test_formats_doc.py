"""docs/formats.md shows what the code does: prompts, messages and results in it are made by the code.

After a change of the code, or of a request or an output in the page:

    python tests/test_formats_doc.py --update
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepseek_api_compat.cli import parse
from deepseek_api_compat.models import catalogue, prepared
from deepseek_api_compat.protocol import deepseek
from deepseek_api_compat.protocol.deepseek.segments import USER
from deepseek_api_compat.protocol.openai import DecodeLimits, declared_functions, decode_chat
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.template import ModelTemplate
from deepseek_api_compat.protocol.template_process import environment
from deepseek_api_compat.protocol.tokenizer import V41_TOKENS, Tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"

# In the page a comment says what the block after it is:
#     request: NAME             an input, which prompts refer to
#     prompt: FORMAT NAME       what becomes of it; with fields that are added to the request
#     turns: FORMAT NAME        the same from the first user turn on
#     message: FORMAT {...}     two blocks: an output, and what `parse` makes of it
#     results: FORMAT {...}     a table: what it is, an output, and in other columns what `parse` makes of it
REQUEST = re.compile(r"<!-- request: (\w+) -->\n```json\n(.*?)^```$", re.M | re.S)
TEMPLATE = re.compile(r"^```jinja\n(.*?)\n```$", re.M | re.S)
FENCE_END = r"(?P<shown>.*?)^```$"
PROMPT = re.compile(
    r"(?P<head><!-- (?P<kind>prompt|turns): (?P<format>\S+) (?P<name>\w+)(?P<fields> \{[^\n]*\})? -->\n"
    r"```text\n)" + FENCE_END,
    re.M | re.S,
)
MESSAGE = re.compile(
    r"(?P<head><!-- message: (?P<format>\S+) (?P<fields>\{[^\n]*\}) -->\n"
    r"```text\n(?P<output>.*?)\n```\n.*?```json\n)" + FENCE_END,
    re.M | re.S,
)
RESULTS = re.compile(
    r"(?P<head><!-- results: (?P<format>\S+) (?P<fields>\{.*\}) -->\n\|.*\n\|.*\n)(?P<shown>(\|.*\n)*)"
)
GIVEN = {"start": "content", "tools_declared": True, "engine_finish": "stop"}


def refreshed(page: str) -> str:
    """The page with everything in it that the code makes."""
    requests = {name: json.loads(body) for name, body in REQUEST.findall(page)}
    chatml = TEMPLATE.findall(page)[0]

    def prompt(found: re.Match[str]) -> str:
        request = {**requests[found["name"]], **json.loads(found["fields"] or "{}")}
        text = "".join(segment.text for segment in segments(found["format"], request, chatml))
        return text[text.index(USER) :] if found["kind"] == "turns" else text

    page = PROMPT.sub(lambda found: f"{found['head']}{prompt(found)}\n```", page)
    page = MESSAGE.sub(lambda found: f"{found['head']}{readable(parsed(found, found['output']))}\n```", page)
    return RESULTS.sub(lambda found: found["head"] + rows(found), page)


def segments(format: str, request: dict[str, Any], chatml: str) -> list[Segment]:
    body = json.dumps({"model": "m", **request}).encode()
    decoded, functions = decode_chat(body, DecodeLimits()), declared_functions(body)
    if format == "template":
        template = ModelTemplate(chatml, bos="", eos="<|im_end|>", controls=("<|im_start|>", "<|im_end|>"))
        draft = template.draft(decoded, functions)
        variables = json.loads(next(draft.attempts()))
        return draft.prompt(environment().from_string(chatml).render(variables)).segments
    name, variant = ("v3", "0324") if format == "v3-0324" else (format, None)
    return deepseek.render(name, variant, decoded, functions)


def parsed(found: re.Match[str], output: str) -> dict[str, Any]:
    """What `deepseek-api parse` says, with ids that are not random."""
    line = {"format": found["format"], **GIVEN, "output": output, **json.loads(found["fields"])}
    message = parse.message(msgspec.convert(line, parse.Line))
    for number, call in enumerate(message["tool_calls"]):
        call["id"] = f"call_{number}"
    return message


def readable(message: dict[str, Any]) -> str:
    """JSON with a line for each field."""
    fields = (f'  "{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in message.items())
    return "{\n" + ",\n".join(fields) + "\n}"


def rows(found: re.Match[str]) -> str:
    made = ""
    for row in found["shown"].splitlines():
        what, output = row.strip("| ").split(" | ")[:2]
        message = parsed(found, output.strip("`").replace("\\n", "\n"))
        functions = [call["function"] for call in message["tool_calls"]]
        calls = "; ".join(f"{function['name']}({function['arguments']})" for function in functions)
        cells = (message["content"], message["reasoning_content"], calls, message["finish_reason"])
        made += f"| {what} | {output} | {' | '.join(map(code, cells))} |\n"
    return made


def code(text: str | None) -> str:
    return f"`{text}`".replace("\n", "\\n") if text else ""


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_examples_are_what_the_code_makes() -> None:
    assert refreshed(page()) == page()


@pytest.mark.parametrize("format", [*deepseek.FORMATS, "v3-0324", "template"])
def test_each_format_has_an_example(format: str) -> None:
    """One that is compared: where its block is empty, it comes back."""
    found = next(found for found in PROMPT.finditer(page()) if found["format"] == format)
    assert found["shown"]
    start, end = found.span("shown")
    assert refreshed(page()[:start] + page()[end:]) == page()


@pytest.mark.parametrize("pattern", [MESSAGE, RESULTS])
def test_messages_and_results_are_compared_too(pattern: re.Pattern[str]) -> None:
    def without_results(found: re.Match[str]) -> str:
        cut: Callable[[str], str] = (lambda _: "") if pattern is MESSAGE else first_cells
        return found["head"] + cut(found["shown"]) + ("```" if pattern is MESSAGE else "")

    changed = pattern.sub(without_results, page())
    assert changed != page()
    assert refreshed(changed) == page()


def first_cells(table: str) -> str:
    return "".join(" | ".join(row.split(" | ")[:2]) + " |\n" for row in table.splitlines())


def test_token_ids_are_those_of_the_tokenizers() -> None:
    v3, v4 = (prepared.pull(catalogue.find(f"deepseek-{version}-tokenizer")) for version in ("v3", "v4"))
    controls = [Tokenizer(v3).controls, Tokenizer(v4).controls, Tokenizer(v4, V41_TOKENS).controls]
    section = page().partition("## Control tokens")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for spellings, *ids in rows:
        known = [
            " / ".join(str(one.get(spelling.strip("`"), "-")) for spelling in spellings.split(" / "))
            for one in controls
        ]
        assert ids == known, spellings


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    PAGE.write_text(refreshed(page()), encoding="utf-8")
