"""The bench of the output parsers runs, and covers every format."""

import subprocess
import sys
from pathlib import Path

from deepseek_api_compat.protocol.deepseek import output


def test_the_bench_prints_a_cost_for_each_format() -> None:
    command = [sys.executable, "-m", "bench.parser", "--quick"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    head, *lines = done.stdout.splitlines()
    assert head.split()[-3:] == ["content", "reasoning", "arguments"]
    costs = {name: [float(cost) for cost in costs] for name, *costs in map(str.split, lines)}
    assert list(costs) == [*output.FORMATS, "template"]
    assert all(len(of) == 3 and min(of) > 0 for of in costs.values())
