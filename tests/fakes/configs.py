"""Configurations of services under test."""

from __future__ import annotations

from typing import Any

from fakes.chat_upstream import ChatUpstream

TINY = "smollm2-135m-instruct"
CONTEXT = 2048
UPSTREAM_KEY = "sk-of-the-upstream"
ENVIRONMENT = {"TEST_UPSTREAM_KEY": UPSTREAM_KEY}

IMPATIENT = """
[server]
header_timeout = 1.0
body_timeout = 1.0
first_event_timeout = 0.4
keep_alive_interval = 0.2

[limits]
requests_per_second = 0
max_queue = 6
"""

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


def chat(model: str, content: str = "Hello", **more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}
