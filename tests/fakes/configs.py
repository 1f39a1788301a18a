"""Configurations of services under test."""

from __future__ import annotations

from typing import Any

from fakes.chat_upstream import ChatUpstream

TINY = "smollm2-135m-instruct"
CONTEXT = 2048
UPSTREAM_KEY = "sk-of-the-upstream"
ENVIRONMENT = {"TEST_UPSTREAM_KEY": UPSTREAM_KEY}

LIMITS = """
[limits]
requests_per_second = 0
max_queue = 6
"""

# However long a busy machine takes for an answer, nothing but the answer is sent.
PATIENT = (
    """
[server]
first_event_timeout = 60.0
"""
    + LIMITS
)

# Keep-alives come soon, and slow clients have little time: for the tests of just that.
IMPATIENT = (
    """
[server]
header_timeout = 1.0
body_timeout = 1.0
first_event_timeout = 0.4
keep_alive_interval = 0.2
"""
    + LIMITS
)

# One engine with two slots, that says the same to the same prompt.
ENGINE = f"""
[[models]]
name = "tiny"
temperature = 0.0
[[models.engines]]
kind = "llamacpp"
path = "{TINY}"
batch_size = 2
context = {CONTEXT}
threads = 1
"""


def upstream_model(name: str, upstream: ChatUpstream, **settings: Any) -> str:
    """A model that `upstream` serves, under the name `their-model`."""
    more = "\n".join(f"{key} = {value}" for key, value in settings.items())
    return f"""
[[models]]
name = "{name}"
[[models.engines]]
kind = "openai"
base_url = "{upstream.url}"
model = "their-model"
api_key_env = "TEST_UPSTREAM_KEY"
{more}
"""


def counting(model: str, **more: Any) -> dict[str, Any]:
    """A chat request that has one answer: at no token of it is the second likeliest near the likeliest.

    Of other answers the model is not so sure that the word it chooses never depends on what else the engine
    decodes at the time, or has decoded before.
    """
    begun = {
        "role": "assistant",
        "content": "".join(f"{number} " for number in range(201, 240)),
        "prefix": True,
    }
    body = chat(model, "Count on.", logit_bias={"2": -100}, **more)  # token 2 would end the answer
    body["messages"].append(begun)
    return body


def chat(model: str, content: str = "Hello", **more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}
