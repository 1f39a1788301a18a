"""Which of DeepSeek's formats a model speaks, from what its files say.

The chat template decides. DeepSeek's templates are told apart by what each alone writes; others have
re-indented and patched them in their conversions, so only the text between tokens is looked at, not the
template's code. Models without a template are known by their architecture and tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.util import find_spec
from typing import NamedTuple

from deepseek_api_compat.protocol.deepseek.segments import (
    ASSISTANT,
    BOS,
    EOS,
    SEP,
    THINK,
    THINK_END,
    USER,
)

TEMPLATE = "template"
SYSTEM = "<｜System｜>"
DSML = "｜DSML｜"
V4_FORMATS = ("v4", "v4.1")

_TURNS = (BOS, EOS, USER, ASSISTANT)
_THINKING = (*_TURNS, THINK, THINK_END)
# The control tokens without which a format means nothing. Those of tools are not among them: the small
# models distilled from R1 have none, and read their spellings as text.
REQUIRED: dict[str, tuple[str, ...]] = {
    "v3": _TURNS,
    "v3-0324": _TURNS,
    "r1": _THINKING,
    "v3.1": _THINKING,
    "v3.2": _THINKING,
    "v4": (*_THINKING, DSML),
    "v4.1": (*_THINKING, DSML, SYSTEM),
}

_CODE = r"['\"\s{}%+~-]*"  # what may stand between two texts that a template writes in a row
_CLOSES_THINKING = re.compile(f"{ASSISTANT}{_CODE}{THINK_END}")
_OPENS_THINKING = re.compile(f"{ASSISTANT}{_CODE}{THINK}")
_USER_OPENS_ANSWER = re.compile(f"{USER}[^{{}}%<>]*{ASSISTANT}")  # in one expression
# Hugging Face's `model_type` and class names ("deepseek_v32", "DeepseekV3ForCausalLM"), llama.cpp's names.
_VERSION = re.compile(r"deepseek[-_]?v?([234])([1-9])?(?!\d)")


class Detected(NamedTuple):
    """A format, and why it is this one: a clause for people."""

    format: str
    why: str


def detect(*, chat_template: str | None, architecture: str = "", controls: Collection[str] = ()) -> Detected:
    """The format, one of `REQUIRED` or "template".

    architecture: `model_type` or a class of config.json, or `general.architecture` of a GGUF file.
    controls: the spellings of the model's control tokens; empty if they aren't known. A model that lacks
    some that its format needs gets "template".
    """
    if chat_template:
        found = _by_template(chat_template, controls)
    else:
        found = _by_architecture(architecture.lower(), controls)
    lacking = missing(found.format, controls) if controls else []
    if lacking:
        return Detected(TEMPLATE, f"{found.why}, but the vocabulary has no {', '.join(lacking)}")
    return found


def missing(format: str, controls: Collection[str]) -> list[str]:
    """The control tokens that the format needs and that aren't there."""
    return [token for token in REQUIRED.get(format, ()) if token not in controls]


def unmet(format: str, controls: Collection[str]) -> str:
    """Why this format can't be spoken here, in one sentence; "" if it can."""
    if lacking := missing(format, controls):
        return (
            f"The model has no control token {', '.join(lacking)}, which the format {format} needs; "
            "set models.format to another one."
        )
    return unmet_package(format)


def unmet_package(format: str) -> str:
    """Which package the format needs that isn't installed, in one sentence; "" if none."""
    if format in V4_FORMATS and find_spec("deepseek_recipe") is None:
        return (
            f"The format {format} needs the package deepseek-recipe: "
            "pip install 'deepseek-api-compat[formats]'."
        )
    return ""


def _by_template(template: str, controls: Collection[str]) -> Detected:
    if USER not in template or ASSISTANT not in template:
        return Detected(TEMPLATE, "its chat template is not one of DeepSeek's")
    if DSML in template:
        return _by_tags(template)
    if _CLOSES_THINKING.search(template):
        return Detected("v3.1", f"its chat template writes {THINK_END} after {ASSISTANT}")
    if _OPENS_THINKING.search(template):
        return Detected("r1", f"its chat template begins answers with {THINK}")
    strips = THINK_END in template
    if _USER_OPENS_ANSWER.search(template):
        if strips:  # R1-0528 and the models distilled from it
            return Detected("r1", f"its chat template drops what stands before {THINK_END} in the history")
        return Detected("v3-0324", f"its chat template writes {ASSISTANT} with the user's turn")
    if strips and THINK in controls and SEP not in controls:
        # R1's first template was V3's. V3 itself was never distilled.
        return Detected(
            "r1", f"its chat template and its token {THINK} are those of a model distilled from R1"
        )
    return Detected("v3", "its chat template is DeepSeek-V3's")


def _by_tags(template: str) -> Detected:
    if "function_calls" in template:
        return Detected("v3.2", f"its chat template writes calls as {DSML} function_calls")
    if SYSTEM in template:
        return Detected("v4.1", f"its chat template writes {DSML} and {SYSTEM}")
    return Detected("v4", f"its chat template writes calls as {DSML} tool_calls")


def _by_architecture(architecture: str, controls: Collection[str]) -> Detected:
    # The tokens first: conversions of V4.1 may carry V4's architecture.
    for token, format in ((SYSTEM, "v4.1"), (DSML, "v4")):
        if token in controls:
            return Detected(format, f"it has no chat template, but the token {token}")
    why = f"it has no chat template; its architecture is {architecture or 'not known'}"
    version = _VERSION.search(architecture)
    if version is None:
        return Detected(TEMPLATE, why)
    if version[1] == "4":
        return Detected("v4.1" if version[2] else "v4", why)
    if version[1] == "3":
        return Detected("v3.2" if version[2] else "v3", why)
    # llama.cpp calls V3 deepseek2 too; V2 has other tokens, or the same format.
    return Detected("v3", why) if controls else Detected(TEMPLATE, why)
