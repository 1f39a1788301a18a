"""Relaying to a chat upstream: any OpenAI-compatible server behind this gateway.

The request is re-emitted once from validated fields, unknown ones verbatim. On the way back bytes are
forwarded as they come, one write per read; only usage and error events are parsed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from deepseek_api_compat.engines.sse import unfinished
from deepseek_api_compat.engines.upstream import Lost, Response
from deepseek_api_compat.errors import (
    ApiError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    InvalidRequest,
    RateLimited,
)
from deepseek_api_compat.gateway.account import Account
from deepseek_api_compat.gateway.chat_prefix import SentText
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.gateway.response import Sink
from deepseek_api_compat.protocol.openai import StreamOptions, reencode

BYTES_PER_TOKEN = 4  # of a request's body, about
MEDIA_TOKENS = 1000  # of a picture or a recording in it, about
MAX_BODY = 256 * 1024 * 1024
# A quote right before and after: inside a JSON string it would be escaped, so text never matches.
USAGE = re.compile(rb'"usage"\s*:\s*\{')
ERROR = re.compile(rb'^data:\s*\{\s*"error"\s*:', re.MULTILINE)
DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_cache_hit_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    usage: _Counts | None = None
    choices: list[msgspec.Raw] = []


class _ErrorBody(msgspec.Struct):
    message: str = ""


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody | str | None = None


_answer = msgspec.json.Decoder(_Answer)
_error = msgspec.json.Decoder(_ErrorAnswer)


async def relay(
    pool: ModelPool,
    path: str,
    body: bytes,
    out: Sink,
    account: Account,
    *,
    stream: bool = False,
    options: StreamOptions | None = None,
    limit: int | None = 0,
    choices: int = 1,
    replace: Mapping[str, Any] | None = None,
    apart: Sequence[int] = (),
) -> None:
    """Send `body` to an upstream of `pool` and its answer to `out`.

    `limit` and `choices`: how much each of how many answers may have. `replace`: fields of the body in place
    of the client's. Until the upstream has counted them, a prompt's tokens are a quarter of its bytes, and
    `MEDIA_TOKENS` for each file, of which `apart` has the bytes.

    An upstream that fails before the client has any of the answer is replaced by another one of the model;
    later only by one that continues messages (`SentText`).

    Raises ApiError for anything that keeps the answer from being complete. Closes the upstream
    connection at once when cancelled.
    """
    prompt = (len(body) - sum(apart)) // BYTES_PER_TOKEN + len(apart) * MEDIA_TOKENS
    await account.reserve(pool, prompt, limit, choices)
    fields = dict(replace or {})
    wants_usage = options is not None and bool(options.include_usage)
    if stream and not wants_usage:
        fields["stream_options"] = {"include_usage": True}
    sent = SentText() if stream and path == "/chat/completions" and pool.continues else None
    tried: set[int] = set()
    begun = 0
    while True:
        lease = None
        if pool.leased:
            lease = await pool.lease(account.principal.index, order=pool.upstreams(tried))
            state = pool.state_of(lease.replica)
            upstream = pool.upstream_of(state)
        else:
            state, upstream = await pool.upstream(tried)
        tried.add(state.replica)
        try:
            await account.dispatch(state.replica)
            if not account.tally.prompt_tokens:  # it may be worked on from now on
                account.tally.prompt_tokens = prompt
            request = reencode(body, {**fields, "model": pool.upstream_model(state)})
            admitted = pool.admit(state.replica)
            response = None
            try:
                response = await upstream.request("POST", path, request)
                if response.status != 200:
                    raise upstream_error(response, await response.read())
                if stream:
                    await _relay_events(response, out, account, sent, hide_usage=not wants_usage)
                else:
                    await _relay_body(response, out, account)
                pool.told(state.replica, admitted, None)
                return
            except BaseException as error:
                if isinstance(error, ApiError) and (response is None or response.status != 200):
                    account.tally.prompt_tokens = 0  # no prompt was worked on
                pool.told(state.replica, admitted, error)
                raise
            finally:
                if response is not None:
                    response.close()
        except (EngineUnavailable, EngineTimeout, EngineFailed, RateLimited):
            if out.written:
                # Only by the text that the client has, and not twice without any more of it.
                rest = None if sent is None else sent.rest_of(body, limit)
                if sent is None or rest is None or sent.tokens == begun:
                    raise
                begun, fields, tried = sent.tokens, fields | rest, pool.not_continuing()
            if not pool.others(tried):
                raise
        finally:
            if lease is not None:
                lease.release()


async def _relay_body(response: Response, out: Sink, account: Account) -> None:
    data = await response.read()
    try:
        _count(_answer.decode(data).usage, account.tally)
    except msgspec.MsgspecError:
        raise EngineFailed("The upstream answered something that is not a completion.") from None
    account.writing()
    await out.finish(data)


async def _relay_events(
    response: Response, out: Sink, account: Account, sent: SentText | None, *, hide_usage: bool
) -> None:
    """Forward whole SSE events, and note them as `sent`, behind those that are.

    A stream that ends without [DONE] is an error, not an end.
    """
    rest = b""
    continuing = sent is not None and sent.tokens > 0
    done = counted = False
    tally = account.tally
    while data := await response.chunk():
        if rest:
            data = rest + data
        if b"\r" in data:  # JSON has no raw CR, so this only turns CRLF line ends into LF
            data = data.replace(b"\r", b"")
        cut = data.rfind(b"\n\n") + 2
        if cut < 2:
            rest = unfinished(data)
            continue
        events, rest = (data, b"") if cut == len(data) else (data[:cut], data[cut:])
        if sent is not None and continuing:
            events = sent.behind(events)
        if not tally.first:
            tally.first = time.monotonic()
        failed: ApiError | None = None
        if b'"error"' in events and (found := ERROR.search(events)) is not None:
            events, failed = events[: found.start()], _error_in(events[found.start() :])
        done = b"[DONE]" in events and DONE.search(events) is not None
        if not counted:  # a token each, until usage says better
            tally.completion_tokens += events.startswith(b"data:") + events.count(b"\ndata:") - done
        if b'"usage"' in events and USAGE.search(events):
            counted = True
            events = _take_usage(events, tally, hide=hide_usage)
        account.progress()
        if sent is not None:
            sent.add(events)
        account.writing()
        if done and not failed:
            await out.finish(events)
        elif events:
            await out.write(events)
        if failed is not None:
            raise failed
        if done:
            break
    if not done:
        raise Lost("The upstream ended its stream before the answer was complete.")


def _take_usage(events: bytes, tally: Tally, *, hide: bool) -> bytes:
    """Read usage out of the events; drop the usage-only event if the client didn't ask for it."""
    kept = []
    for event in events.split(b"\n\n"):
        if event.startswith(b"data:") and USAGE.search(event):
            try:
                answer = _answer.decode(event[5:].lstrip())
            except msgspec.MsgspecError:
                raise EngineFailed("The upstream sent a malformed usage event.") from None
            _count(answer.usage, tally)
            if hide and not answer.choices:
                continue
        kept.append(event)
    return b"\n\n".join(kept)


def _error_in(events: bytes) -> EngineFailed:
    """What the upstream says in the event that these begin with."""
    event = events.split(b"\n\n", 1)[0]
    words = _words(event.removeprefix(b"data:"))
    return EngineFailed(f"The upstream reported an error in the middle of its answer. {words}".strip())


def _words(body: bytes) -> str:
    """An error's message; "" if it has none."""
    try:
        found = _error.decode(body).error
    except msgspec.MsgspecError:
        return ""
    return found if isinstance(found, str) else found.message if found else ""


def _count(usage: _Counts | None, tally: Tally) -> None:
    if usage is None:
        return
    tally.prompt_tokens = usage.prompt_tokens
    tally.completion_tokens = usage.completion_tokens
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details else usage.prompt_cache_hit_tokens
    tally.cached_tokens = cached or 0


def upstream_error(response: Response, body: bytes) -> ApiError:
    """What an upstream's failure means to our client: its own mistakes stay 400, others become 502 or 503."""
    message = _words(body)
    status = response.status
    if status in (400, 413, 422):
        return InvalidRequest(message or "The upstream refused the request.")
    if status == 429:
        header = response.headers.get(b"retry-after", b"")
        return RateLimited(
            message or "The upstream is over its rate limit.",
            retry_after=float(header) if header.isdigit() else 1.0,
        )
    if status in (401, 403):
        return EngineFailed("The upstream refused this gateway's credentials; check api_key_env.")
    if status == 503:
        return EngineUnavailable(message or "The upstream is not available.", retry_after=5.0)
    return EngineFailed(f"The upstream answered {status}. {message}".strip())
