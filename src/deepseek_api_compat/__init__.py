"""DeepSeek-V3 in a box: client names here, loaded when first used; the server is `deepseek-api serve`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepseek_api_compat.client.openai import AsyncOpenAI, OpenAI

__all__ = ["AsyncOpenAI", "OpenAI", "__version__"]

_HOMES = {"OpenAI": "deepseek_api_compat.client.openai", "AsyncOpenAI": "deepseek_api_compat.client.openai"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
