"""Prompt templates: texts of the operator's, chosen by a request and filled with its variables.

Variables are data: a text is rendered once, in Jinja's sandbox, and what a variable says is never a template.
Rendering has bounds of size and time; for the time that no text comes at all, the plugin's own timeout.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_api_compat.plugins import Context, Refuse
from deepseek_api_compat.protocol.template_process import environment

SUFFIXES = {".system.jinja": "system", ".user.jinja": "user"}
MESSAGE = "message"  # the variable that is the user's message
RENDER_TIME = 2.0  # seconds


class PromptTemplates:
    """templates: by name, each with a text `system`, `user` or both. defaults: a template's name by model.

    directory: of more, as files NAME.system.jinja and NAME.user.jinja, read when the service starts.
    max_chars: of a rendered text, and of a request's variables as JSON.
    """

    name = "prompt-templates"
    on_error = "refuse"

    def __init__(
        self,
        templates: dict[str, dict[str, str]] | None = None,
        directory: str | None = None,
        defaults: dict[str, str] | None = None,
        max_chars: int = 1 << 20,
    ) -> None:
        """Raises ValueError for a template or a default that is none, OSError for an unreadable directory."""
        sources = {name: dict(parts) for name, parts in (templates or {}).items()}
        if directory is not None:
            _read(Path(directory).expanduser(), sources)
        if not sources:
            raise ValueError("there are no templates")
        made = environment()
        made.undefined = jinja2.StrictUndefined
        self._templates = {name: _Template(name, parts, made) for name, parts in sources.items()}
        self._defaults = defaults or {}
        self._max_chars = max_chars
        if unknown := [name for name in self._defaults.values() if name not in self._templates]:
            raise ValueError(f"there is no template {unknown[0]!r}")

    def pre_process(self, request: dict[str, Any], context: Context) -> dict[str, Any]:
        name, variables = request.pop("template", None), request.pop("variables", None)
        if name is None:
            name = self._defaults.get(context.model)
        if name is None:
            if variables is not None:
                raise Refuse("`variables` are for a `template`.", code="invalid_value", param="variables")
            return request
        if not isinstance(name, str):
            raise Refuse("`template` must be the name of a template.", code="invalid_value", param="template")
        if name not in self._templates:
            raise Refuse(f"There is no template {name[:64]!r}.", code="template_not_found", param="template")
        variables = self._checked({} if variables is None else variables)
        return {
            **request,
            "messages": self._templates[name].messages(request["messages"], variables, self._max_chars),
        }

    def _checked(self, variables: Any) -> dict[str, Any]:
        wrong = None
        if not isinstance(variables, dict):
            wrong = "`variables` must be an object."
        elif MESSAGE in variables:
            wrong = f"The variable `{MESSAGE}` is the user's message; it can't be given."
        elif len(json.dumps(variables, ensure_ascii=False)) > self._max_chars:
            wrong = f"`variables` are longer than {self._max_chars} characters."
        if wrong is not None:
            raise Refuse(wrong, code="invalid_value", param="variables")
        made: dict[str, Any] = variables
        return made


class _Template:
    """One template: a system text before the messages, a text around the last user message, or both."""

    def __init__(self, name: str, parts: dict[str, str], made_by: ImmutableSandboxedEnvironment) -> None:
        if not parts or not parts.keys() <= set(SUFFIXES.values()):
            raise ValueError(f"the template {name!r} must have a text `system`, `user` or both, and no more")
        self._name = name
        self._parts = {part: _compiled(name, part, text, made_by) for part, text in parts.items()}

    def messages(self, messages: list[Any], variables: dict[str, Any], longest: int) -> list[Any]:
        """The messages with the template's texts. Raises Refuse."""
        made = list(messages)
        if "user" in self._parts:
            at = next((i for i in reversed(range(len(made))) if made[i].get("role") == "user"), None)
            if at is None:
                raise Refuse(
                    f"The template {self._name!r} needs a user message.",
                    code="invalid_value",
                    param="messages",
                )
            content = made[at].get("content")
            text = self._rendered("user", {**variables, MESSAGE: _text_of(content)}, longest)
            made[at] = {**made[at], "content": _with_text(content, text)}
        if "system" in self._parts:
            made.insert(0, {"role": "system", "content": self._rendered("system", variables, longest)})
        return made

    def _rendered(self, part: str, variables: dict[str, Any], longest: int) -> str:
        pieces, length, until = [], 0, time.monotonic() + RENDER_TIME
        try:
            for piece in self._parts[part].generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > longest or time.monotonic() > until:
                    raise self._refused("makes a text that is too long with these variables")
        except jinja2.UndefinedError as error:  # "'language' is undefined"
            raise self._refused(f"lacks a variable: {error.message}") from None
        except jinja2.TemplateError as error:
            raise self._refused(f"can't be filled: {error.message or type(error).__name__}") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            raise self._refused("can't be filled: a variable has a wrong type or value") from None
        return "".join(pieces)

    def _refused(self, reason: str) -> Refuse:
        return Refuse(f"The template {self._name!r} {reason}.", code="invalid_value", param="variables")


def _read(directory: Path, sources: dict[str, dict[str, str]]) -> None:
    """Add the templates of a directory's files. Raises OSError, ValueError."""
    for path in sorted(directory.iterdir()):
        for suffix, part in SUFFIXES.items():
            if path.name.endswith(suffix) and path.name != suffix:
                name = path.name.removesuffix(suffix)
                if part in sources.setdefault(name, {}):
                    raise ValueError(f"the template {name!r} has two texts {part!r}")
                sources[name][part] = path.read_text("utf-8")


def _compiled(name: str, part: str, text: str, made_by: ImmutableSandboxedEnvironment) -> jinja2.Template:
    if not isinstance(text, str):
        raise ValueError(f"`{part}` of the template {name!r} must be a text")
    try:
        return made_by.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"`{part}` of the template {name!r}, line {error.lineno}: {error}") from None


def _text_of(content: Any) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return "".join(text for part in content if (text := _part_text(part)) is not None)
    return content if isinstance(content, str) else ""


def _with_text(content: Any, text: str) -> Any:
    """The content with this text in place of its own; pictures and sound stay, in order, behind it."""
    if not isinstance(content, list):
        return text
    others = [part for part in content if _part_text(part) is None]
    return [{"type": "text", "text": text}, *others]


def _part_text(part: Any) -> str | None:
    """None for a part that is no text."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None
