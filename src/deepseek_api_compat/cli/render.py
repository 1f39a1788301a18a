"""`deepseek-api render`: the exact prompts that requests become, for debugging."""

from __future__ import annotations

import argparse
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from deepseek_api_compat.cli.lines import answer_lines
from deepseek_api_compat.models import catalogue, prepared
from deepseek_api_compat.models.progress import Progress
from deepseek_api_compat.protocol import deepseek
from deepseek_api_compat.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DecodeLimits,
    declared_functions,
    decode_chat,
    decode_completion,
    reencode,
)
from deepseek_api_compat.protocol.tokenizer import V41_TOKENS, Tokenizer

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Reads JSON lines on standard input,
  {"format": "v3.1", "request": {"messages": [...], ...}}
where the request is OpenAI's (for the text in a gap: prompt and suffix), and writes one line for each:
  {"prompt": "...", "prompt_ids": [...]}, or {"error": {...}} for a request that the format can't express."""


class _Line(msgspec.Struct):
    format: str
    request: msgspec.Raw
    variant: str | None = None


def add_parser(subparsers: Subparsers) -> None:
    """Add `render`, which sets `run`, a function from the arguments to the exit code."""
    parser = subparsers.add_parser(
        "render",
        help="show the prompts that requests become",
        description=_DESCRIPTION,
        epilog=f"formats: {', '.join(deepseek.FORMATS)}, v3-0324",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    return answer_lines(_Line, _prompt)


def _prompt(given: _Line) -> dict[str, Any]:
    format, variant = ("v3", "0324") if given.format == "v3-0324" else (given.format, given.variant)
    # The model plays no part in rendering, so it may be missing.
    body = reencode(bytes(given.request), {"model": format})
    request = _request(body)
    functions = declared_functions(body) if isinstance(request, ChatRequest) else None
    segments = deepseek.render(format, variant, request, functions)
    return {
        "prompt": "".join(segment.text for segment in segments),
        "prompt_ids": _tokenizer(format).encode(segments),
    }


def _request(body: bytes) -> ChatRequest | CompletionRequest:
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    decode = decode_completion if "prompt" in fields and "messages" not in fields else decode_chat
    return decode(body, DecodeLimits())


@lru_cache
def _tokenizer(format: str) -> Tokenizer:
    version = "v4" if format.startswith("v4") else "v3"
    path = prepared.pull(catalogue.find(f"deepseek-{version}-tokenizer"), Progress())
    return Tokenizer(path, V41_TOKENS if format == "v4.1" else None)
