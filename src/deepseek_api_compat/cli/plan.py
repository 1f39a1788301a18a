"""`deepseek-api plan`: does a model fit on these machines, how is it split, and how is it started?"""

from __future__ import annotations

import argparse
import shlex
import textwrap
from typing import TYPE_CHECKING

import msgspec

from deepseek_api_compat.models import launch as launches
from deepseek_api_compat.models import plan as plans
from deepseek_api_compat.models.architecture import find_model
from deepseek_api_compat.models.gpus import GB, GPUS, find_gpu

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp"}
_EPILOG = f"""GPUs: {", ".join(gpu.name for gpu in GPUS)}.

examples:
  deepseek-api plan --model deepseek-v3 --gpu h200 --count 8
  deepseek-api plan --model deepseek-v3.1 --gpu h100-80 --nodes 2 --head 192.0.2.1 --json > plan.json
  deepseek-api plan --model deepseek-r1 --gpu none --ram 512
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `plan`, which sets `run`: from the arguments to the exit code, 1 where nothing fits."""
    parser = subparsers.add_parser(
        "plan",
        help="see what a model needs, and how to launch it",
        description="Compute from a model's config.json where its bytes go, the longest context and how many "
        "requests that fit, and the command line of each node. Nothing is measured.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model", required=True, help="a name from 'models list', or a folder with config.json, or this file"
    )
    add("--gpu", required=True, help="the kind of GPU, or none")
    add("--count", type=_whole, default=8, metavar="N", help="GPUs of a node (default 8)")
    add("--nodes", type=_whole, default=1, metavar="N", help="machines (default 1)")
    add("--ram", type=_whole, default=0, metavar="GB", help="memory of a node for llama.cpp")
    add("--context", type=_whole, default=0, metavar="TOKENS", help="of a request (default: all that fits)")
    add("--concurrency", type=_whole, default=0, metavar="N", help="requests at a time")
    add("--engine", choices=("auto", "vllm", "sglang", "llamacpp"), default="auto")
    add("--quant", choices=[*plans.BITS], help="of the weights (default: as published, if the GPU can)")
    add("--kv-dtype", choices=("bf16", "fp8"), default="bf16", help="of the KV cache (default bf16)")
    add("--prefer", choices=("latency", "throughput"), default="latency", help="few requests, or many")
    add("--mtp", action="store_true", help="with multi-token prediction")
    add("--path", help="where the weights are, if not under their published name")
    add("--head", default=launches.HEAD, metavar="ADDRESS", help="of the first node, as the others reach it")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="for 'serve --plan'")
    output.add_argument("--toml", action="store_true", help="[[models]] for the configuration file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    question = plans.Question(
        model=find_model(args.model),
        gpu=None if args.gpu == "none" else find_gpu(args.gpu),
        count=args.count,
        nodes=args.nodes,
        ram=args.ram * GB,
        engine=args.engine,
        quant=args.quant,
        fp8_cache=args.kv_dtype == "fp8",
        context=args.context,
        concurrency=args.concurrency,
        prefer=args.prefer,
        mtp=args.mtp,
        path=args.path,
    )
    launch = launches.launch(plans.make_plan(question), args.head)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(launch)).decode())
    elif args.toml:
        print(launches.toml(launch.models), end="")
    else:
        print("\n".join(_lines(launch)))
    return 0


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _lines(launch: launches.Launch) -> list[str]:
    plan = launch.plan
    where = f"{plan.nodes * plan.count} x {find_gpu(plan.gpu).title}" if plan.gpu else "CPU and RAM"
    lines = [
        f"{plan.model} on {where}: fits.",
        "",
        f"  parameters   {plan.parameters / 1e9:.1f} billion, {plan.active / 1e9:.1f} billion for each token",
        f"  weights      {plan.quant.upper()}, from {plan.path}",
        f"  engine       {_NAMES[plan.engine]}" + ("" if plan.engine == "llamacpp" else f", {_split(plan)}"),
        "",
        *_table(plan),
        "",
        f"  KV cache     {plan.cached:,} bytes a token, {plan.tokens:,} tokens" + _copies(plan),
        f"  context      {plan.context:,} tokens; the longest that fits is {plan.longest:,}",
        f"  requests     {plan.concurrency} at a time" + _typical(plan),
        "",
    ]
    for note in plan.notes:
        lines += textwrap.wrap(note, 100, initial_indent="  note: ", subsequent_indent="        ")
    lines += [""] * bool(plan.notes)
    for rank, words in enumerate(launch.nodes):
        lines += [f"Node {rank}:" if plan.nodes > 1 else "Command:", "", f"  {shlex.join(words)}", ""]
    return [*lines, "As [[models]] of the service: --toml. Computed, not measured; see docs/plan.md."]


def _split(plan: plans.Plan) -> str:
    return plan.layout.said(int(any(use.name == "routed experts" for use in plan.uses)))


def _table(plan: plans.Plan) -> list[str]:
    """Where the bytes go: one GPU's (llama.cpp: all GPUs'), and the RAM's."""
    lines: list[str] = []
    for place in ("GPU", "RAM"):
        uses = [use for use in plan.uses if use.place == place]
        if not uses:
            continue
        whose = "RAM" if place == "RAM" else "all GPUs" if plan.engine == "llamacpp" else "the fullest GPU"
        lines.append(f"  GB of {whose}")
        lines += [f"    {use.name:<32}{use.bytes / 1e9:>9.2f}" for use in uses]
        if place == plan.cache_place:
            lines.append(f"    {'left for the KV cache':<32}{plan.free / 1e9:>9.2f}")
            lines.append(f"    {'kept free':<32}{(plan.memory - plan.budget) / 1e9:>9.2f}")
            lines.append(f"    {'in all':<32}{plan.memory / 1e9:>9.2f}")
    return lines


def _copies(plan: plans.Plan) -> str:
    data = plan.layout.data
    return f" in each of {data} caches" if data > 1 else ""


def _typical(plan: plans.Plan) -> str:
    if plan.context * plan.concurrency <= plan.tokens * plan.layout.data:
        return ", each as long as the context"
    return f", of {plan.tokens * plan.layout.data // plan.concurrency:,} tokens each; longer ones wait"
