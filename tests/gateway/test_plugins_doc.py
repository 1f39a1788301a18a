"""docs/plugins.md, followed by a newcomer: its files work as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from deepseek_api_compat import config
from deepseek_api_compat.gateway.plugins import check

DOCUMENT = Path(__file__).parents[2] / "docs" / "plugins.md"
BLOCKS = re.findall(r"^```(python|toml)\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_plugin_is_built_and_its_test_passes(tmp_path: Path) -> None:
    (_, plugin), (_, table), (_, test) = BLOCKS[:3]
    for name, text in (("greeter.py", plugin), ("config.toml", table), ("test_greeter.py", test)):
        (tmp_path / name).write_text(text)
    settings = config.load(str(tmp_path / "config.toml"))
    check(
        [
            config.PluginSettings(use=one.use, options=one.options, path=str(tmp_path))
            for one in settings.plugins
        ]
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
