"""What a worker counts of its requests, as Prometheus reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# In a process of its own: prometheus_client chooses between files and memory when it is imported.
COUNTING = """
import os, signal, sys
from deepseek_api_compat.gateway.metrics import Tally
for number in range(int(sys.argv[1])):
    for model in ("small", f"model-{number}"):
        tally = Tally("/chat/completions", 100.0)
        tally.model, tally.status, tally.first = model, 200, 100.3
        tally.prompt_tokens, tally.cached_tokens = 10, 4
        tally.completion_tokens, tally.reasoning_tokens = 7, 3
        tally.settle(100.0 + (0.005, 0.5, 1000.0)[number % 3])
os.kill(os.getpid(), signal.SIGKILL)
"""
READING = """
from deepseek_api_compat.gateway.metrics import LedgerCollector, exposition
print(exposition([], LedgerCollector(problem=False, lag=0.0, pending=0, damaged=0)).decode())
"""


def python(code: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def samples(directory: Path) -> dict[str, float]:
    text = python(READING, directory).stdout
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines if name}


def test_two_killed_workers_lose_no_count(tmp_path: Path) -> None:
    for _ in range(2):
        assert python(COUNTING, tmp_path, "3").returncode == -9
    found = samples(tmp_path)
    labels = 'endpoint="/chat/completions",model="small"'
    assert found[f'deepseek_requests_total{{{labels},status="200"}}'] == 6
    kinds = {
        kind: found[f'deepseek_tokens_total{{kind="{kind}",model="small"}}'] for kind in ("prompt", "cached")
    }
    assert kinds == {"prompt": 60, "cached": 24}
    assert found['deepseek_tokens_total{kind="completion",model="small"}'] == 42
    assert found['deepseek_tokens_total{kind="reasoning",model="small"}'] == 18
    assert found['deepseek_time_to_first_token_seconds_count{model="small"}'] == 6


def test_a_duration_counts_in_the_bucket_that_ends_with_it_and_all_above(tmp_path: Path) -> None:
    python(COUNTING, tmp_path, "3")
    found = samples(tmp_path)
    name, labels = "deepseek_request_duration_seconds", 'endpoint="/chat/completions",le="{}",model="small"'
    counts = [
        found[f"{name}_bucket{{{labels.format(le)}}}"] for le in ("0.005", "0.25", "0.5", "300.0", "+Inf")
    ]
    assert counts == [1, 1, 2, 2, 3]
    total = found[f'{name}_sum{{endpoint="/chat/completions",model="small"}}']
    assert abs(total - 1000.505) < 1e-6


def test_counts_stay_when_the_file_grows(tmp_path: Path) -> None:
    # A megabyte at first; 200 models with their histograms need more.
    python(COUNTING, tmp_path, "200")
    assert any(path.stat().st_size > 1 << 20 for path in tmp_path.iterdir())
    found = samples(tmp_path)
    assert found['deepseek_tokens_total{kind="completion",model="small"}'] == 7 * 200
    assert found['deepseek_time_to_first_token_seconds_count{model="small"}'] == 200
    assert found['deepseek_time_to_first_token_seconds_count{model="model-199"}'] == 1
