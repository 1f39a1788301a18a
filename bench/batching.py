"""What continuous batching brings: tokens/s of several clients over those of one, by `batch_size`.

    python -m bench.batching [--engines llamacpp vllm] [--clients 8] [--tokens 128] [--rounds 5]

One client, then so many at the same time, in turns, each with its own prompt, through the whole service: with
the embedded engine and its model, and with vLLM on the CPU and the tiny DeepSeek-V3, as the tests run it, if
`make vllm-venv` has made its environment or DEEPSEEK_VLLM_PYTHON names its Python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import processes
from bench.service import Service
from bench.streams import Stream, client
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.models import catalogue, prepared, tiny_v3

MODEL = "tiny"
VLLM_PYTHON = Path(
    os.environ.get("DEEPSEEK_VLLM_PYTHON") or Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
)
VLLM_COMMAND = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
# As in tests/service/test_vllm.py: anything else computes wrongly, and is refused when it starts.
VLLM_ARGS = ["--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA"]
VLLM_ARGS += ["--compilation-config", '{"custom_ops": ["none"]}']


def llamacpp(directory: Path, slots: int) -> str:
    return f"""
[[models]]
name = "{MODEL}"
[[models.engines]]
kind = "llamacpp"
path = "smollm2-135m-instruct"
batch_size = {slots}
context = 1024
"""


def vllm(directory: Path, slots: int) -> str:
    model = tiny_v3.build(directory / "v3", prepared.pull(catalogue.find("deepseek-v3-tokenizer")))
    return f"""
[[models]]
name = "{MODEL}"
[[models.engines]]
kind = "vllm"
path = "{model}"
command = {json.dumps(VLLM_COMMAND)}
args = {json.dumps(VLLM_ARGS)}
batch_size = {slots}
context = 1024
[models.engines.env]
VLLM_CPU_KVCACHE_SPACE = "1"
HF_HUB_OFFLINE = "1"
"""


class Engine(NamedTuple):
    """models: the configuration, for a directory and so many slots. end: the token that ends its answers."""

    models: Callable[[Path, int], str]
    end: int


ENGINES = {"llamacpp": Engine(llamacpp, 2), "vllm": Engine(vllm, 1)}


async def rate(upstream: Upstream, clients: int, tokens: int, end: int) -> float:
    """Tokens a second of all clients together."""
    prompts = [f"Tell story number {number}." for number in range(clients)]
    streams = [Stream(MODEL, prompt, tokens, end=end) for prompt in prompts]
    began = time.perf_counter()
    await asyncio.gather(*(stream.read(upstream) for stream in streams))
    seconds = time.perf_counter() - began
    if problems := [stream.error for stream in streams if not stream.complete]:
        raise RuntimeError(f"an answer is not complete: {problems[0]}")
    return sum(stream.usage["completion_tokens"] for stream in streams) / seconds


async def measure(service: Service, args: argparse.Namespace, end: int) -> None:
    upstream = client(service)
    found: dict[int, list[float]] = {1: [], args.clients: []}
    try:
        for clients in found:
            await rate(upstream, clients, 8, end)  # what an engine does only once is not counted
        for _ in range(args.rounds):
            for clients in found:
                found[clients].append(await rate(upstream, clients, args.tokens, end))
    finally:
        await upstream.close()
    for clients, rates in found.items():
        print(f"  {clients} clients: {median(rates):.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f})")
    ratios = [many / one for one, many in zip(found[1], found[args.clients], strict=True)]
    print(f"  ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} pairs)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name in args.engines:
        if name == "vllm" and not VLLM_PYTHON.exists():
            print("vllm: not here (make vllm-venv)")
            continue
        with tempfile.TemporaryDirectory() as directory:
            service = Service(Path(directory), ENGINES[name].models(Path(directory), args.clients))
            service.start(MODEL, patience=600.0)
            try:
                processes.wait_for_quiet(10.0)
                print(f"{name}, beside other work on {processes.busy_cores():.1f} cores:", flush=True)
                asyncio.run(measure(service, args, ENGINES[name].end))
            finally:
                service.stop()


if __name__ == "__main__":
    main()
