"""What the gateway costs: the mock asked directly, through nginx, and through our gateway, in turns.

    python -m bench.gateway [--quick] [--rounds N] [--only requests,tokens] [--json FILE]
    python -m bench.gateway --targets gateway --only requests,tokens --rounds 10 --before OTHER/deepseek-api

The gateway checks the key and the rate limit of each request; nginx only relays, and shows what this machine
can do. Both have one worker on core 1; the mock and the load generator are on core 0. Each figure is the
median of some rounds, and in each round every target is measured in turn, so that what else the machine does
hits all alike. Needs Linux, a C compiler, two cores, and nginx to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import processes
from bench.processes import cpu_seconds, load, memory_mb, mock_counts
from bench.service import Service

MODEL = "deepseek-v3"
STREAM_LEVELS = (512, 640, 768, 896, 1024)
PACE = 50  # tokens a second of a paced stream
PACED_DELAY_LIMIT = 10_000.0  # microseconds
MAX_OTHERS = 0.15  # cores that other processes, interrupts and a hypervisor may take from a measurement


@dataclass(frozen=True)
class Target:
    """Something that answers chat completions. `pid` None: it is the mock itself."""

    name: str
    port: int
    key: str = "none"
    pid: int | None = None


@dataclass(frozen=True)
class Figure:
    """A line of the table. `goal` is what we promise of the gateway, in words."""

    title: str
    unit: str
    digits: int = 0
    goal: str = ""


FIGURES = {
    "requests": Figure("requests, not streamed, 32 connections", "/s", goal=">= 12000"),
    "request_cpu": Figure("CPU for a request", "us", 1),
    "added_p50": Figure("added latency at 50 requests/s, p50", "ms", 2, "< 0.8"),
    "added_p99": Figure("added latency at 50 requests/s, p99", "ms", 2),
    "tokens": Figure("tokens relayed flat out, 32 streams", "/s", goal=">= 100000"),
    "token_cpu": Figure("CPU for a token, flat out", "us", 1),
    "paced_p99": Figure("512 streams at 50 tokens/s, p99 delay", "ms", 2, "< 10"),
    "paced_cpu": Figure("CPU for a token at that pace", "us", 1),
    "streams": Figure("streams at 50 tokens/s with p99 < 10 ms", "", goal=">= 512"),
    "start": Figure("start to first answer", "s", 2, "< 1"),
    "rss": Figure("idle memory of a worker, RSS", "MB", 1, "< 60"),
    "pss": Figure("idle memory of a worker, PSS", "MB", 1),
}


@dataclass
class Results:
    """All values of all rounds: figure -> target -> values."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, figure: str, target: str, value: float) -> None:
        self.values.setdefault(figure, {}).setdefault(target, []).append(value)

    def median(self, figure: str, target: str) -> float | None:
        values = self.values.get(figure, {}).get(target)
        return median(values) if values else None


class Bench:
    """The measurements. Each takes one target and adds to `results`."""

    def __init__(self, mock: tuple[int, int], seconds: float, patience: float) -> None:
        self.results = Results()
        self.errors = 0
        self.disturbed = 0  # measurements during which other processes ran, in spite of all patience
        self._mock_port, self._mock_pid = mock
        self._seconds = seconds
        self._patience = patience
        self._direct_latency = (0.0, 0.0)
        self._too_many: dict[str, int] = {}

    def requests(self, target: Target) -> None:
        run, counts, cpu = self._load(target, "-m ns -c 32")
        self.results.add("requests", target.name, run["rps"])
        if cpu is not None:
            self.results.add("request_cpu", target.name, cpu / counts["req"] * 1e6)

    def latency(self, target: Target) -> None:
        run, _, _ = self._load(target, "-m open -r 50")
        if target.pid is None:
            self._direct_latency = run["lat50_us"], run["lat99_us"]
            return
        direct50, direct99 = self._direct_latency
        self.results.add("added_p50", target.name, (run["lat50_us"] - direct50) / 1e3)
        self.results.add("added_p99", target.name, (run["lat99_us"] - direct99) / 1e3)

    def tokens(self, target: Target) -> None:
        run, counts, cpu = self._load(target, "-m stream -c 32 -n 500")
        self.results.add("tokens", target.name, run["eps"])
        if cpu is not None:
            self.results.add("token_cpu", target.name, cpu / counts["events"] * 1e6)

    def streams(self, target: Target) -> None:
        """The delay with 512 paced streams, and with more for as long as it stays below the limit."""
        most = 0
        for level in STREAM_LEVELS:
            run, counts, cpu = self._load(
                target, f"-m stream -c {level} -n 100000 -s {1_000_000 // PACE}", warm_up=2.0
            )
            if level == STREAM_LEVELS[0]:
                self.results.add("paced_p99", target.name, run["add99_us"] / 1e3)
                if cpu is not None:
                    self.results.add("paced_cpu", target.name, cpu / counts["events"] * 1e6)
            if run["add99_us"] >= PACED_DELAY_LIMIT or run["eps"] < 0.98 * PACE * level:
                break
            most = level
        self.results.add("streams", target.name, most)

    def _load(
        self, target: Target, arguments: str, warm_up: float = 1.0
    ) -> tuple[dict[str, Any], dict[str, int], float | None]:
        """A run of the load: its report, what the mock counted meanwhile, and the CPU seconds of the target.

        Counts and CPU are of the whole run, warm-up included, so that they fit together. A run that other
        processes disturb is done again, within the patience that was asked for.
        """
        end = time.monotonic() + self._patience
        while True:
            processes.wait_for_quiet(end - time.monotonic())
            before, used, ours, all_ = self._state(target)
            run = load(target.port, target.key, f"{arguments} -d {self._seconds} -w {warm_up}")
            counts_after, used_after, ours_after, all_after = self._state(target)
            others = (all_after - all_) - (ours_after - ours)
            if others < MAX_OTHERS * (self._seconds + warm_up):
                break
            if time.monotonic() > end:
                self.disturbed += 1
                break
        if run["err"]:
            self.errors += run["err"]
            print(f"warning: {target.name}, load {arguments}: {run['err']} errors", file=sys.stderr)
        counts = {name: value - before[name] for name, value in counts_after.items()}
        return run, counts, used_after - used if target.pid else None

    def _state(self, target: Target) -> tuple[dict[str, int], float, float, float]:
        """The mock's counts, and CPU seconds so far: of the target, of all parts of the bench, of all."""
        used = cpu_seconds(target.pid) if target.pid else 0.0
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # the load generators that have ended
        ours = used + cpu_seconds(self._mock_pid) + children.ru_utime + children.ru_stime
        return mock_counts(self._mock_port), used, ours, processes.machine_seconds()


def measure_start(service: Service, rounds: int, patience: float, results: Results) -> None:
    """Start to first answer, several times; the memory of the last one, which stays up, before any load."""
    for _ in range(rounds):
        service.stop()
        processes.wait_for_quiet(patience)
        results.add("start", "gateway", service.start(MODEL))
    rss, pss = memory_mb(service.worker)
    results.add("rss", "gateway", rss)
    results.add("pss", "gateway", pss)


def run(args: argparse.Namespace, directory: Path, stack: contextlib.ExitStack) -> Bench:
    mock_port, mock_pid = stack.enter_context(processes.mock())
    bench = Bench((mock_port, mock_pid), args.seconds, args.patience)
    targets = [Target("direct", mock_port)]
    if "nginx" in args.targets:
        if processes.nginx_program() is None:
            print(
                "note: nginx is not installed (Debian: apt install nginx); no comparison with it",
                file=sys.stderr,
            )
        else:
            port, pid = stack.enter_context(processes.nginx(mock_port, directory))
            targets.append(Target("nginx", port, pid=pid))
            rss, pss = memory_mb(pid)
            bench.results.add("rss", "nginx", rss)
            bench.results.add("pss", "nginx", pss)
    if "gateway" in args.targets:
        models = f'[[models]]\nname = "{MODEL}"\n[[models.engines]]\nkind = "openai"\n'
        models += f'base_url = "http://127.0.0.1:{mock_port}/v1"\nmodel = "{MODEL}"\n'
        service = Service(directory, models)
        stack.callback(service.stop)
        measure_start(service, args.rounds, args.patience, bench.results)
        processes.pin(service.worker, processes.GATEWAY_CORE)
        targets.append(Target("gateway", service.port, service.key, service.worker))
        if args.before:
            before = Service(directory / "before", models, args.before)
            stack.callback(before.stop)
            before.start(MODEL)
            processes.pin(before.worker, processes.GATEWAY_CORE)
            targets.append(Target("before", before.port, before.key, before.worker))
    measures: dict[str, Callable[[Target], None]] = {
        "requests": bench.requests,
        "latency": bench.latency,
        "tokens": bench.tokens,
        "streams": bench.streams,
    }
    for round_ in range(args.rounds):
        for name in args.only:
            for target in targets:
                print(f"round {round_ + 1} of {args.rounds}: {name}, {target.name} ...", file=sys.stderr)
                measures[name](target)
    return bench


def table(results: Results) -> str:
    """The figures as a Markdown table."""
    names = ("direct", "nginx", "gateway")
    lines = ["| | direct | nginx | gateway | gateway / nginx | goal |", "|---|---|---|---|---|---|"]
    for key, figure in FIGURES.items():
        if key not in results.values:
            continue
        medians = {name: results.median(key, name) for name in names}
        cells = [
            "" if value is None else f"{value:,.{figure.digits}f} {figure.unit}".strip()
            for value in medians.values()
        ]
        ours, theirs = medians["gateway"], medians["nginx"]
        ratio = f"{ours / theirs:.2f}" if ours is not None and theirs else ""
        lines.append(f"| {' | '.join([figure.title, *cells, ratio, figure.goal])} |")
    return "\n".join(lines)


def rise(results: Results) -> str:
    """What costs more than in the other checkout: the median of the rounds' ratios, for each figure."""
    lines = []
    for key in ("request_cpu", "token_cpu", "requests", "tokens"):
        pairs = results.values.get(key, {})
        ratios = [
            now / then for now, then in zip(pairs.get("gateway", ()), pairs.get("before", ()), strict=True)
        ]
        if ratios:
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            lines.append(
                f"{FIGURES[key].title}: {median(ratios):.3f} x before ({spread}, {len(ratios)} pairs)"
            )
    return "\n".join(lines)


def report(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All values and their medians, with what they were measured on."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "rounds": args.rounds,
        "seconds": args.seconds,
        "errors": bench.errors,
        "disturbed": bench.disturbed,
        "figures": {
            key: {name: {"median": median(values), "all": values} for name, values in by_target.items()}
            for key, by_target in bench.results.values.items()
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    def words(known: tuple[str, ...]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
            return chosen

        return split

    measures, targets = ("requests", "latency", "tokens", "streams"), ("nginx", "gateway")
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does it work at all?")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (default 3)")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds a measurement may wait for a quiet machine"
    )
    parser.add_argument("--only", type=words(measures), default=list(measures), help=",".join(measures))
    parser.add_argument(
        "--targets", type=words(targets), default=list(targets), help="besides direct: " + ",".join(targets)
    )
    parser.add_argument("--before", metavar="PROGRAM", help="another checkout's deepseek-api to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.seconds, args.patience = 1, 1.0, 0.0
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if connections broke or streams came incomplete: then the figures mean nothing."""
    args = parse(argv)
    cores = os.sched_getaffinity(0)
    if not {processes.LOAD_CORE, processes.GATEWAY_CORE} <= cores:
        print("This needs the cores 0 and 1.", file=sys.stderr)
        return 1
    processes.compile_programs()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        bench = run(args, Path(directory), stack)
    print(table(bench.results))
    if args.before:
        print("\n" + rise(bench.results))
    if bench.disturbed:
        print(
            f"\nOther processes ran during {bench.disturbed} of the measurements: don't trust these figures."
        )
    if args.json:
        args.json.write_text(json.dumps(report(bench, args), indent=1) + "\n")
    return 1 if bench.errors else 0


if __name__ == "__main__":
    sys.exit(main())
