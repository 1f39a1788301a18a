"""The numbers of channel types in new-api and one-api that speak OpenAI's protocol.

Each is the default base URL and what stands between it and `/chat/completions`. The two programs agree on low
numbers; beyond them the same number is another provider.
"""

from __future__ import annotations

_BOTH = {
    1: ("https://api.openai.com", "/v1"),
    6: ("https://api.openaimax.com", "/v1"),
    7: ("https://api.ohmygpt.com", "/v1"),
    9: ("https://api.caipacity.com", "/v1"),
    12: ("https://api.api2gpt.com", "/v1"),
    13: ("https://api.aigc2d.com", "/v1"),
    17: ("https://dashscope.aliyuncs.com", "/compatible-mode/v1"),
    19: ("https://api.360.cn", "/v1"),
    20: ("https://openrouter.ai/api", "/v1"),
    25: ("https://api.moonshot.cn", "/v1"),
    31: ("https://api.lingyiwanwu.com", "/v1"),
}
NEW_API = {
    **_BOTH,
    4: ("http://localhost:11434", "/v1"),  # Ollama
    26: ("https://open.bigmodel.cn", "/api/paas/v4"),
    27: ("https://api.perplexity.ai", ""),
    40: ("https://api.siliconflow.cn", "/v1"),
    42: ("https://api.mistral.ai", "/v1"),
    43: ("https://api.deepseek.com", "/v1"),
    45: ("https://ark.cn-beijing.volces.com", "/api/v3"),
    46: ("https://qianfan.baidubce.com", "/v2"),
    47: ("", "/v1"),  # Xinference
    48: ("https://api.x.ai", "/v1"),
    53: ("https://llm.submodel.ai", "/v1"),
}
ONE_API = {
    **_BOTH,
    28: ("https://api.mistral.ai", "/v1"),
    29: ("https://api.groq.com/openai", "/v1"),
    30: ("http://localhost:11434", "/v1"),  # Ollama
    32: ("https://api.stepfun.com", "/v1"),
    36: ("https://api.deepseek.com", "/v1"),
    39: ("https://api.together.xyz", "/v1"),
    40: ("https://ark.cn-beijing.volces.com", "/api/v3"),
    44: ("https://api.siliconflow.cn", "/v1"),
    45: ("https://api.x.ai", "/v1"),
    50: ("", "/v1"),  # any that is compatible
}
_CUSTOM = 8
_NAMES = {3: "Azure", 14: "Anthropic", 15: "Baidu", 18: "Xunfei", 23: "Tencent", 24: "Gemini", 33: "AWS"}


def channel_base(types: dict[int, tuple[str, str]], number: int, given: str) -> tuple[str, str]:
    """The base URL for a channel of this type, and ""; or "", and why it has none."""
    given = given.strip().rstrip("/")
    if number == _CUSTOM:  # its URL is that of the call itself, or a base as of OpenAI's
        base = (
            given.removesuffix("/chat/completions") if given.endswith("/chat/completions") else f"{given}/v1"
        )
    elif number in types:
        default, path = types[number]
        base = given or default
        base = f"{base}{path}" if base and not base.endswith(path or "/") else base
    else:
        name = f" ({_NAMES[number]})" if number in _NAMES else ""
        return "", f"the type {number}{name} does not speak OpenAI's protocol, or is not known here"
    if not base.startswith(("http://", "https://")) or "{" in base:
        return "", f"its base URL {given!r} is no http URL"
    return base, ""
