"""Print the lowest version of each runtime dependency that pyproject.toml allows, as constraints.

    python tools/lowest.py > lowest.txt; pip install -c lowest.txt -e '.[embedded,formats]'

The tests run once with these on the oldest Python, so that the lower bounds are true.
"""

from __future__ import annotations

import re
from pathlib import Path


def lowest(text: str) -> list[str]:
    """`name==version` for each bound of the optional dependencies."""
    runtime = text.split("[project.optional-dependencies]")[1].split("[dependency-groups]")[0]
    found = re.findall(r'"([a-z0-9-]+)(?:\[[a-z]+\])?>=([0-9.]+)', runtime)
    return [f"{name}=={version}" for name, version in found]


if __name__ == "__main__":
    print("\n".join(lowest((Path(__file__).parent.parent / "pyproject.toml").read_text())))
