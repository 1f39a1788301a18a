"""How each format tells the model about its tools, as segments that follow the system text.

V3.1's and V3.2's texts are DeepSeek's (model card, encoder), R1's is vLLM's. For V3 there is no official
one; ours uses the markers that V3-0324's template writes for calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_api_compat.protocol.deepseek.conversation import to_json
from deepseek_api_compat.protocol.deepseek.segments import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEP,
    THINK,
    THINK_END,
    given,
    written,
)
from deepseek_api_compat.protocol.segment import Segment

Functions = Sequence[dict[str, Any]]

_V3_CALL = f"{CALL_BEGIN}function{SEP}FUNCTION_NAME\n```json\nARGUMENTS\n```{CALL_END}"
_V3_START = """

## Tools

You can call these functions, described in JSON Schema:
"""
_V3_END = f"""

To call functions, end your reply with one block in exactly this format, where ARGUMENTS is a JSON object:
{CALLS_BEGIN}{_V3_CALL}
{_V3_CALL}{CALLS_END}

The block has one entry for each call. Its results come next. Without a need for a function, just answer."""


def v3(functions: Functions) -> Iterator[Segment]:
    if functions:
        yield from written(_V3_START)
        yield given("".join(f"\n{to_json(function)}" for function in functions))
        yield from written(_V3_END)


_R1_START = f"""

You are a helpful assistant with tool calling capabilities. \
When a tool call is needed, you MUST use the following format to issue the call:
{CALLS_BEGIN}{CALL_BEGIN}function{SEP}FUNCTION_NAME
```json
{{"param1": "value1", "param2": "value2"}}
```{CALL_END}{CALLS_END}

Make sure the JSON is valid.## Tools

### Function

You have the following functions available:

"""


def r1(functions: Functions) -> Iterator[Segment]:
    if functions:
        yield from written(_R1_START)
        tools = ({"type": "function", "function": function} for function in functions)
        yield given("".join(f"\n```json\n{to_json(tool)}\n```\n" for tool in tools))


_V31_START = """

## Tools
You have access to the following tools:
"""
_V31_END = f"""
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{CALLS_BEGIN}{CALL_BEGIN}tool_call_name{SEP}tool_call_arguments{CALL_END}{{additional_tool_calls}}{CALLS_END}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""


def v31(functions: Functions) -> Iterator[Segment]:
    if functions:
        yield from written(_V31_START)
        yield given("".join(map(_v31_function, functions)))
        yield from written(_V31_END)


def _v31_function(function: dict[str, Any]) -> str:
    return (
        f"\n### {function['name']}\nDescription: {function.get('description') or ''}\n\n"
        f"Parameters: {to_json(function.get('parameters') or {})}\n"
    )


_V32_START = f"""

## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your \
reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and \
objects should use JSON format. The "string" attribute should be set to "true" for string type parameters \
and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a \
thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

{THINK}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
"""


def v32(functions: Functions) -> Iterator[Segment]:
    if functions:
        yield from written(_V32_START)
        yield given("\n".join(map(to_json, functions)))
        yield from written("\n</functions>\n")
