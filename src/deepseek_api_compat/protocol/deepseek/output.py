"""The output parser of each DeepSeek format, by the format's name."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from deepseek_api_compat.protocol.deepseek.output_dsml import DsmlParser
from deepseek_api_compat.protocol.deepseek.output_markers import V3, V31, MarkerParser
from deepseek_api_compat.protocol.deepseek.output_reader import STARTS
from deepseek_api_compat.protocol.output import Parser

_LAYOUTS = {"v3": V3, "v3-tools": V3, "r1": V3, "v3.1": V31}
_DSML = ("v3.2", "v4", "v4.1")
FORMATS = (*_LAYOUTS, *_DSML)


def call_id() -> str:
    """A new tool call's id, impossible to guess."""
    return f"call_{secrets.token_hex(12)}"


def parser(
    format: str,
    *,
    start: str,
    tools_declared: bool,
    tools: list[str],
    index: int = 0,
    new_id: Callable[[], str] = call_id,
) -> Parser:
    """The parser of one choice; one of `FORMATS`, else ValueError.

    start: where the prompt left off, one of `STARTS`, else ValueError; see `protocol.segment.Prompt`.
    tools: names of the declared tools. Calls of others are reported too: the client decides.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r}.")
    if format in _DSML:
        return DsmlParser(
            trim=format != "v3.2", start=start, tools_declared=tools_declared, index=index, new_id=new_id
        )
    layout = _LAYOUTS[format]
    return MarkerParser(layout, start=start, tools_declared=tools_declared, index=index, new_id=new_id)
