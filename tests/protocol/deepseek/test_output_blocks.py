"""A second block right after a call is the same at any split."""

from deepseek_api_compat.protocol.deepseek.output import parser
from deepseek_api_compat.protocol.events import Text, ToolCall
from deepseek_api_compat.protocol.job import Piece

CALL = "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
OUTPUT = f"<｜tool▁calls▁begin｜>{CALL}<｜tool▁calls▁begin｜>{CALL}<｜tool▁calls▁end｜>"


def read(pieces: list[str]) -> tuple[str, dict[int, str]]:
    """The text, and each call's name and arguments."""
    one = parser("v3.1", start="content", tools_declared=True, tools=["look"], new_id=lambda: "call_1")
    events = [event for piece in pieces for event in one.feed(Piece(text=piece))]
    events += one.feed(Piece(finish="stop")) + one.close()
    text, calls = "", {}
    for event in events:
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, ToolCall):
            calls[event.call_index] = calls.get(event.call_index, "") + (event.name or "") + event.arguments
    return text, calls


def test_a_second_block_right_after_a_call() -> None:
    whole = read([OUTPUT])
    assert whole[1][0] == "look{}"
    assert read(list(OUTPUT)) == whole
    for cut in range(1, len(OUTPUT)):
        assert read([OUTPUT[:cut], OUTPUT[cut:]]) == whole, cut
