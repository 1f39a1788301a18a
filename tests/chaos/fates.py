"""What became of a request. Pure: from what was on the wire to a verdict.

answered   complete, and right as far as that can be told
refused    a 4xx, in OpenAI's shape
failed     an explicit error: a 5xx, or an error in place of an answer's end
left       the client went before the end
broken     the connection broke; allowed only to those of a worker that was killed just then
wrong      anything else
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from chaos.exchange import Exchange
from fakes import token_language as language

Kind = Literal["answered", "refused", "failed", "left", "broken", "wrong"]
SERVER_ERRORS = frozenset({502, 503, 504})
RELAYED = "r"  # what a relayed answer has of each token is this and its number


class Violation(Exception):
    """What must not be; says why."""


@dataclass
class Choice:
    text: str = ""
    finish: str | None = None
    arguments: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Fate:
    """prompt, completion: as the answer's usage says, None where it says nothing. seen: some of an answer."""

    kind: Kind
    why: str = ""
    prompt: int | None = None
    completion: int | None = None
    seen: bool = False


def judge(found: Exchange) -> Fate:
    try:
        return _judge(found)
    except (Violation, language.Wrong) as error:
        return Fate("wrong", str(error))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return Fate("wrong", f"not understood: {error!r}")


def _judge(found: Exchange) -> Fate:
    seen = b"data: {" in found.body
    if found.end in ("left", "broken"):
        return Fate(found.end, f"after {len(found.body)} bytes of an answer", seen=seen)
    if found.end == "silent":
        raise Violation("no end of the answer came")
    if not found.id:
        raise Violation("an answer without a request id")
    if found.status != 200:
        return _refusal(found)
    if isinstance(found.ask.body, bytes):
        raise Violation("a malformed request was answered")
    if not found.ask.stream:
        document = json.loads(found.body)
        if "error" in document:
            return _failure(document, 200)
        choices = {choice["index"]: _whole(choice) for choice in document["choices"]}
        usage = document.get("usage")
        if usage is None:
            raise Violation("a whole answer without usage")
        return _answered(found, choices, usage)
    return _streamed(found)


def _refusal(found: Exchange) -> Fate:
    fate = _failure(json.loads(found.body), found.status)
    if found.status >= 500:
        if found.status not in SERVER_ERRORS:
            raise Violation(f"status {found.status}")
        return fate
    if found.status != 429 and not isinstance(found.ask.body, bytes):
        raise Violation(f"a good request was refused with {found.status}")
    return Fate("refused", fate.why)


def _failure(document: dict[str, Any], status: int) -> Fate:
    error = document["error"]
    if (
        set(document) != {"error"}
        or set(error) != {"message", "type", "param", "code"}
        or not error["message"]
    ):
        raise Violation("an error that is not OpenAI's object")
    return Fate("failed", f"{status} {error['code'] or error['type']}: {error['message']}")


def _streamed(found: Exchange) -> Fate:
    body = found.body.decode()
    if not body.endswith("\n\n"):
        raise Violation("the stream ends within an event")
    blocks = [block for block in body[:-2].split("\n\n") if not block.startswith(":")]
    if any(not block.startswith("data: ") or "\n" in block for block in blocks):
        raise Violation("something that is no event")
    *events, last = [block[6:] for block in blocks]
    if '"error"' in last and "error" in (document := json.loads(last)):
        seen = bool(events)
        if "[DONE]" in events:
            raise Violation("an error behind [DONE]")
        return Fate("failed", _failure(document, 200).why, seen=seen)
    if last != "[DONE]":
        raise Violation("a stream without [DONE] and without an error")
    choices: dict[int, Choice] = defaultdict(Choice)
    usage = None
    for event in events:
        chunk = json.loads(event)
        if "error" in chunk:
            raise Violation("an error in the middle of a stream")
        if chunk.get("usage"):
            if usage is not None:
                raise Violation("usage twice")
            usage = chunk["usage"]
        for one in chunk["choices"]:
            _take(choices[one["index"]], one)
    wanted = bool(found.ask.fields.get("stream_options"))
    if wanted != (usage is not None):
        raise Violation("usage is missing" if wanted else "usage that nobody asked for")
    return _answered(found, choices, usage)


def _take(choice: Choice, chunk: dict[str, Any]) -> None:
    if choice.finish is not None:
        raise Violation("a choice goes on after its end")
    delta = chunk["delta"]
    choice.text += delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        choice.arguments += call["function"].get("arguments") or ""
    choice.logprobs += (chunk.get("logprobs") or {}).get("content") or ()
    choice.finish = chunk["finish_reason"]


def _whole(document: dict[str, Any]) -> Choice:
    message = document["message"]
    calls = message.get("tool_calls") or ()
    return Choice(
        message.get("content") or "",
        document["finish_reason"],
        "".join(call["function"]["arguments"] for call in calls),
        (document.get("logprobs") or {}).get("content") or [],
    )


def _answered(found: Exchange, choices: dict[int, Choice], usage: dict[str, int] | None) -> Fate:
    fields = found.ask.fields
    if sorted(choices) != list(range(fields.get("n", 1))):
        raise Violation(f"choices {sorted(choices)}")
    if any(choice.finish not in ("stop", "length", "tool_calls") for choice in choices.values()):
        raise Violation(f"ends with {[choice.finish for choice in choices.values()]}")
    prompt = completion = None
    if usage is not None:
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        if usage["total_tokens"] != prompt + completion:
            raise Violation(f"usage {usage}")
    checks = {"fake": _check_fake, "relay": _check_relay, "real": _check_real}
    made = checks[found.ask.model](found, choices, prompt)
    if completion is None:
        completion = made
    elif made is not None and made != completion:
        raise Violation(f"{made} tokens came, usage says {completion}")
    return Fate("answered", prompt=prompt, completion=completion, seen=True)


def _check_fake(found: Exchange, choices: dict[int, Choice], prompt: int | None) -> int:
    """Every token is the right one."""
    fields = found.ask.fields
    ids = language.prompt(fields["messages"])
    if prompt not in (None, len(ids)):
        raise Violation(f"{prompt} prompt tokens, there are {len(ids)}")
    made = 0
    for choice in choices.values():
        told = language.Told(choice.text, str(choice.finish), fields.get("stop", ()), fields["max_tokens"])
        made += language.check(ids, told)
        if fields.get("logprobs"):
            _check_logprobs(choice)
    return made


def _check_logprobs(choice: Choice) -> None:
    """Each word has its own; those of characters made of several tokens are not all known."""
    words = [(one["token"], one["logprob"]) for one in choice.logprobs if one["token"] in language.WORDS]
    right = [(language.decode([id]), language.logprob(id)) for id in language.encode(choice.text) if id > 255]
    if words != right:
        raise Violation(f"logprobs of {len(words)} words, there are {len(right)}")


def _check_relay(found: Exchange, choices: dict[int, Choice], prompt: int | None) -> int:
    count = found.ask.fields["max_tokens"]
    if choices[0].text != relayed(count):
        raise Violation("the relayed text is not what the upstream sent")
    return int(count)


def relayed(count: int) -> str:
    return "".join(f"{RELAYED}{number} " for number in range(count))


def _check_real(found: Exchange, choices: dict[int, Choice], prompt: int | None) -> None:
    fields = found.ask.fields
    for choice in choices.values():
        if fields.get("tools") and choice.finish == "tool_calls":
            if set(json.loads(choice.arguments)) != {"word"}:
                raise Violation("the tool's schema does not hold")
        elif fields.get("tools") and choice.finish == "stop":
            raise Violation("a forced call was not made")
        if fields.get("response_format") and choice.finish == "stop":
            value = json.loads(choice.text)
            if set(value) != {"size", "count"}:
                raise Violation("the JSON schema does not hold")
        if any(stop in choice.text for stop in fields.get("stop", ())):
            raise Violation("a stop string was sent")
        if fields.get("logprobs") and not choice.logprobs:
            raise Violation("logprobs are missing")
