"""Programs that run at the same time, each printing a line of JSON for each cell of its row of a table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds for a row, on a machine that has much else to do
Cells = dict[str, Any]


class Rows:
    """Starts all of them: `commands` by row, in `folder`, with `environment`."""

    def __init__(
        self, commands: Mapping[str, Sequence[str]], folder: Path, environment: Mapping[str, str]
    ) -> None:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._programs = {
            row: subprocess.Popen(command, cwd=folder, env=environment, **pipes)
            for row, command in commands.items()
        }
        self._cells: dict[str, Cells] = {}

    def cells(self, row: str) -> Cells:
        """What a row has printed, by cell. Waits for its end; fails if that is not a good one."""
        if row not in self._cells:
            program = self._programs[row]
            printed, complaints = program.communicate(timeout=PATIENCE)
            assert program.returncode == 0, complaints
            lines = [json.loads(line) for line in printed.splitlines()]
            self._cells[row] = {line["cell"]: line["got"] for line in lines}
        return self._cells[row]

    def close(self) -> None:
        for program in self._programs.values():
            program.kill()
            program.communicate()
