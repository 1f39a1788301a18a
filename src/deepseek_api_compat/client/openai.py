"""The `openai` package's clients, which find a DeepSeek service by themselves.

`DEEPSEEK_API_KEY` and `DEEPSEEK_BASE_URL` are used where no key or address is given; everything else
is the `openai` package's own behaviour.
"""

from __future__ import annotations

import os
from typing import Any

import openai

if not hasattr(openai, "OpenAI"):
    raise ImportError(
        "This client needs openai 1.0 or later (pip install -U openai). With openai 0.28 use its own style: "
        "openai.api_base = 'http://127.0.0.1:8000/v1'."
    )

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"


def _defaults(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("api_key") is None:
        options["api_key"] = os.environ.get("DEEPSEEK_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if options.get("base_url") is None:
        options["base_url"] = os.environ.get("DEEPSEEK_BASE_URL") or DEFAULT_BASE_URL
    return options


class OpenAI(openai.OpenAI):
    """As `openai.OpenAI`; without `base_url` it talks to the service on this machine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**_defaults(options))


class AsyncOpenAI(openai.AsyncOpenAI):
    """As `openai.AsyncOpenAI`; without `base_url` it talks to the service on this machine."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**_defaults(options))
