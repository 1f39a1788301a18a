from __future__ import annotations

import io

from deepseek_api_compat.models.progress import Progress


class Screen(Progress):
    """Progress into a string."""

    def __init__(self) -> None:
        self._lines = io.StringIO()
        super().__init__(self._lines)

    @property
    def text(self) -> str:
        return self._lines.getvalue()
