"""DeepSeek-V3 in a box: client names here, loaded when first used; the server is `deepseek-api serve`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepseek_api_compat.client.auth import AuthManager
    from deepseek_api_compat.client.inputs import AudioInput, ImageInput
    from deepseek_api_compat.client.openai import AsyncOpenAI, OpenAI

__all__ = ["AsyncOpenAI", "AudioInput", "AuthManager", "ImageInput", "OpenAI", "__version__"]

_HOMES = {
    "AsyncOpenAI": "deepseek_api_compat.client.openai",
    "AudioInput": "deepseek_api_compat.client.inputs",
    "AuthManager": "deepseek_api_compat.client.auth",
    "ImageInput": "deepseek_api_compat.client.inputs",
    "OpenAI": "deepseek_api_compat.client.openai",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
