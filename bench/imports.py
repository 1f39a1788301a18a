"""What `from deepseek_api_compat import OpenAI` takes beyond the `openai` package's own import.

    python -m bench.imports [--rounds 15]

A fresh process for each, in turn; seconds of the import statement alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

MODULES = {"openai": "from openai import OpenAI", "ours": "from deepseek_api_compat import OpenAI"}
PROGRAM = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


def seconds(statement: str) -> float:
    program = PROGRAM.format(statement)
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for statement in MODULES.values():  # compiled, and in the page cache
        seconds(statement)
    found = [{name: seconds(statement) for name, statement in MODULES.items()} for _ in range(rounds)]
    for name in MODULES:
        print(f"{name:7} {median(one[name] for one in found):.3f} s")
    more = [one["ours"] - one["openai"] for one in found]
    print(f"more    {median(more):.3f} s ({min(more):.3f} to {max(more):.3f})")


if __name__ == "__main__":
    main()
