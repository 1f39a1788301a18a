"""What the gateway takes from the embedded engine: it is asked directly, and through the gateway, in turns.

    python -m bench.engine [--rounds N] [--tokens N] [--streams 1,8] [--json FILE]

Both answer the same prompt with the same sampling (temperature 0), and both are read by the same client,
which does little but look at the clock until the end. Tokens/s are those of all streams together, from the
first token to the last. The engine uses all cores: what the gateway uses, it lacks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench import processes
from bench.service import Service
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.llamacpp_wire import completion_body
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.protocol.job import Job, Sampling

MODEL = "deepseek-v3"  # an alias of the embedded model
MESSAGES = [{"role": "user", "content": "Tell a long story about a lighthouse keeper and the sea."}]


class Source:
    """One way to ask for the same answer."""

    def __init__(self, name: str, endpoint: Endpoint, path: str, body: dict[str, Any]) -> None:
        self.name = name
        self._upstream = Upstream(endpoint)
        self._path = path
        self._body = json.dumps(body).encode()

    async def stream(self) -> tuple[int, float, float]:
        """One answer: its tokens, and when the first and the last of them came."""
        response = await self._upstream.request("POST", self._path, self._body)
        try:
            parts, first, last = [], 0.0, 0.0
            while data := await response.chunk():
                parts.append(data)
                # Not the progress through the prompt, the role, or the usage and [DONE] after the last token.
                if b'"content":"' in data and b'"content":""' not in data:
                    last = time.perf_counter()
                    first = first or last
        finally:
            response.close()
        text = b"".join(parts)
        if response.status != 200:
            raise RuntimeError(f"{self.name}: {response.status} {text[:500]!r}")
        return tokens_of(text), first, last

    async def rate(self, streams: int) -> float:
        """Tokens a second of so many streams at once."""
        answers = await asyncio.gather(*(self.stream() for _ in range(streams)))
        tokens = sum(count - 1 for count, _, _ in answers)  # the clock starts with the first
        return tokens / (max(last for *_, last in answers) - min(first for _, first, _ in answers))

    async def close(self) -> None:
        await self._upstream.close()


def tokens_of(stream: bytes) -> int:
    """The tokens of an answer, by the engine's own count: in its last event, or in the gateway's usage."""
    count = 0
    for line in stream.split(b"\n"):
        if line.startswith(b"data: {"):
            event = json.loads(line[len(b"data: ") :])
            count = (
                (event.get("usage") or {}).get("completion_tokens") or event.get("tokens_predicted") or count
            )
    return count


def sources(service: Service, tokens: int) -> list[Source]:
    prompt = service.ask("/tokenize", {"model": MODEL, "messages": MESSAGES})["tokens"]
    job = Job(prompt_ids=prompt, max_tokens=tokens, sampling=Sampling(temperature=0.0))
    request = {"model": MODEL, "messages": MESSAGES, "max_tokens": tokens, "temperature": 0.0, "stream": True}
    gateway = Endpoint(port=service.port, headers={"Authorization": f"Bearer {service.key}"})
    return [
        Source("engine", Endpoint(uds=service.engine_socket()), "/completion", completion_body(job)),
        Source(
            "gateway",
            gateway,
            "/v1/chat/completions",
            {**request, "stream_options": {"include_usage": True}},
        ),
    ]


async def measure(service: Service, args: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """streams -> source -> tokens/s of each round."""
    asked = sources(service, args.tokens)
    rates: dict[int, dict[str, list[float]]] = {n: {s.name: [] for s in asked} for n in args.streams}
    try:
        for source in asked:
            await source.rate(max(args.streams))  # fills the slots' prompt caches
        for round_ in range(args.rounds):
            # Every other round begins with the other one: whatever drifts hits both alike.
            for source in asked if round_ % 2 == 0 else reversed(asked):
                for streams in args.streams:
                    rates[streams][source.name].append(await source.rate(streams))
    finally:
        for source in asked:
            await source.close()
    return rates


def table(rates: dict[int, dict[str, list[float]]]) -> str:
    lines = ["| streams | engine | gateway | gateway / engine | goal |", "|---|---|---|---|---|"]
    for streams, by_source in rates.items():
        engine, gateway = by_source["engine"], by_source["gateway"]
        ratio = median(ours / theirs for ours, theirs in zip(gateway, engine, strict=True))
        cells = [str(streams), f"{median(engine):.1f} tokens/s", f"{median(gateway):.1f} tokens/s"]
        lines.append(f"| {' | '.join([*cells, f'{ratio:.3f}', '>= 0.95'])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=6, help="default 6")
    parser.add_argument("--tokens", type=int, default=256, help="max_tokens of each answer (default 256)")
    parser.add_argument(
        "--streams",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1, 8],
        help="how many at once (default 1,8)",
    )
    parser.add_argument("--patience", type=float, default=10.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    args = parser.parse_args(argv)
    processes.wait_for_quiet(args.patience)
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory))
        service.start(MODEL, patience=600.0)  # the first time it fetches the model
        try:
            rates = asyncio.run(measure(service, args))
        finally:
            service.stop()
    print(table(rates))
    if args.json:
        args.json.write_text(json.dumps({"tokens_per_second": rates}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
