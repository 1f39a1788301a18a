"""Every error this product raises on purpose, in one tree.

    DeepSeekError
    +- SetupError            the operator's machine or files are not as needed (one sentence, exit code 1)
    |  +- ConfigError        a configuration file, variable or flag is wrong
    |  +- ModelError         a model can't be fetched, prepared or read
    |  +- WrongValue         what an operation was given is wrong; has `field`
    |  +- NoSuchThing        what an operation was to act on is not there
    +- ApiError              has `status`, `type`, `code`: becomes an OpenAI error object
       +- InvalidRequest     400   the request is malformed; the message names the field
       |  +- ContextTooLong  400   prompt and answer don't fit; the message has both numbers
       +- AuthenticationFailed 401
       +- InsufficientQuota  402   the budget is used up
       +- PermissionDenied   403
       +- NotFound           404
       |  +- ModelNotFound   404   the message lists the known models
       +- MethodNotAllowed   405
       +- RequestTimeout     408   the client was too slow to send its request
       +- Conflict           409   the same request is being answered; has `retry_after`
       +- BodyTooLarge       413
       +- HeadersTooLarge    431
       +- RateLimited        429   has `retry_after`
       +- InternalError      500   our bug
       +- PluginFailed       500   a plugin of the operator's failed, and must not be left out
       +- PluginRefused      any   a plugin of the operator's refused the request
       +- EngineFailed       502   the engine broke, or answered nonsense
       +- EngineUnavailable  503   no engine can answer now; has `retry_after`
       +- EngineTimeout      504   the engine did not start within the queue limit
       +- LedgerUnavailable  503   the request can't be written down; has `retry_after`
       +- OperationFailed    503   an operation of the admin API could not be done; has `retry_after`

Statuses, types and codes follow OpenAI's and DeepSeek's published tables (docs/errors.md).
"""

from __future__ import annotations

from typing import Any


class DeepSeekError(Exception):
    """Root of the tree. `str(error)` is a sentence for a person."""


class SetupError(DeepSeekError):
    """The service or a command can't go on; the message is one clear sentence."""


class ConfigError(SetupError):
    """A setting is unknown or has a wrong value; the message names it."""


class ModelError(SetupError):
    """A model file can't be fetched, prepared or read."""


class WrongValue(SetupError):
    """What an operation was given is wrong. `field` is a path (`limits.rps`), None if it is no one field."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NoSuchThing(SetupError):
    """What an operation was to act on is not there."""


class ApiError(DeepSeekError):
    """An error with a place in OpenAI's error scheme.

    `retry_after` is in seconds; when set it becomes a `Retry-After` header.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """The OpenAI error object, ready for JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    """`tokens` in the prompt (or `at_least` so many), `limit` in the model's context."""

    code = "context_length_exceeded"

    def __init__(self, tokens: int, limit: int, *, at_least: bool = False) -> None:
        counted = f"at least {tokens}" if at_least else f"{tokens}"
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your messages "
            f"resulted in {counted} tokens. Please reduce the length of the messages.",
            param="messages",
        )
        self.tokens = tokens
        self.limit = limit


class AuthenticationFailed(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class InsufficientQuota(ApiError):
    status = 402
    type = "insufficient_quota"
    code = "insufficient_quota"


class PermissionDenied(ApiError):
    status = 403
    type = "permission_error"


class NotFound(ApiError):
    status = 404
    type = "not_found_error"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        super().__init__(
            f"The model {model!r} does not exist. Known models: {', '.join(known) or 'none'}.",
            param="model",
        )


class MethodNotAllowed(ApiError):
    """`allowed` lists the methods the route has; it becomes the `Allow` header."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, method: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"Method {method} is not allowed here; use {' or '.join(allowed)}.")
        self.allowed = allowed


class RequestTimeout(ApiError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(ApiError):
    status = 409
    type = "invalid_request_error"
    code = "idempotency_in_progress"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class HeadersTooLarge(ApiError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InternalError(ApiError):
    status = 500
    type = "server_error"
    code = "internal_error"


class PluginFailed(ApiError):
    status = 500
    type = "server_error"
    code = "plugin_failed"


class PluginRefused(ApiError):
    """`status` and `code` are the plugin's choice: 400 to 599, and any."""

    status = 400
    type = "invalid_request_error"
    code = "plugin_refused"

    def __init__(self, message: str, *, status: int, code: str, param: str | None) -> None:
        super().__init__(message, code=code, param=param)
        if 400 <= status <= 599:
            self.status = status
        if self.status >= 500:
            self.type = "server_error"


class EngineFailed(ApiError):
    status = 502
    type = "server_error"
    code = "engine_failed"


class EngineUnavailable(ApiError):
    status = 503
    type = "server_error"
    code = "engine_unavailable"


class EngineTimeout(ApiError):
    status = 504
    type = "server_error"
    code = "timeout"


class LedgerUnavailable(ApiError):
    status = 503
    type = "server_error"
    code = "ledger_unavailable"


class OperationFailed(ApiError):
    """The supervisor could not do it, or did not answer in time; the message says which."""

    status = 503
    type = "server_error"
    code = "operation_failed"
