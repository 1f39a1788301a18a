"""What reading an answer costs: `python -m bench.parser` prints microseconds a token for each format."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial

from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.job import Piece
from deepseek_api_compat.protocol.output import Parser
from deepseek_api_compat.protocol.output_tags import TagParser

TEXT = "The harbour of Lisbon , where ferries cross to \n the other bank . 天 気 = < 3 ; \n\n "
CALL = {"city": "Lisbon", "days": [1, 2, 3], "note": 'line\nline, "quoted" <b>text</b>', "deep": {"a": None}}
KINDS = ("content", "reasoning", "arguments")
TEMPLATE = "template"


def pieces_of(kind: str, format: str, tokens: int) -> list[Piece]:
    """About that many pieces of four characters or a word, as a model writes them."""
    if kind != "arguments":
        words = [f" {word}" for word in TEXT.split(" ")]
        return [Piece([1], words[at % len(words)]) for at in range(tokens)]
    call = written(format)
    step = [call[at : at + 4] for at in range(0, len(call), 4)]
    return [Piece([1], step[at % len(step)]) for at in range(tokens)]


def written(format: str) -> str:
    """A call as the format has it."""
    arguments = json.dumps(CALL)
    if format == TEMPLATE:
        return f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>\n'
    if format == "v3.1":
        return f"<｜tool▁call▁begin｜>look<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
    if format in ("v3", "v3-tools", "r1"):
        return (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{arguments}\n```<｜tool▁call▁end｜>\n"
        )
    blank = " " if format == "v4.1" else ""
    tags = [
        f'<｜DSML｜{blank}parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜{blank}parameter>\n"
        for key, value in CALL.items()
    ]
    return f'<｜DSML｜{blank}invoke name="look">\n{"".join(tags)}</｜DSML｜{blank}invoke>\n'


def parser_of(format: str, kind: str) -> Parser:
    start = {"content": "content", "reasoning": "reasoning", "arguments": "tool_calls"}[kind]
    if format == TEMPLATE:
        return TagParser(start=start.replace("tool_calls", "content"), tools_declared=True)
    return output.parser(format, start=start, tools_declared=True, tools=["look"])


def cost(make: Callable[[], Parser], pieces: list[Piece], rounds: int) -> float:
    """Microseconds a piece, of the best round."""
    best = float("inf")
    for _ in range(rounds):
        parser = make()
        began = time.thread_time()
        for piece in pieces:
            parser.feed(piece)
        best = min(best, time.thread_time() - began)
    return best / len(pieces) * 1e6


def measure(tokens: int, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Each format, and its costs in the order of KINDS."""
    for format in (*output.FORMATS, TEMPLATE):
        costs = []
        for kind in KINDS:
            pieces = pieces_of(kind, format, tokens)
            costs.append(cost(partial(parser_of, format, kind), pieces, rounds))
        yield format, costs


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds less, to see that it runs")
    quick = parser.parse_args().quick
    print("microseconds a token".ljust(22), *(kind.rjust(10) for kind in KINDS))
    for format, costs in measure(2_000 if quick else 50_000, 1 if quick else 5):
        print(format.ljust(22), *(f"{cost:10.2f}" for cost in costs))


if __name__ == "__main__":
    main()
