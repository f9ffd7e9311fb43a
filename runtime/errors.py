"""Every error Fathom means to raise, and what each becomes on the wire or at the prompt.

Rule: what a client, a file or a flag can cause raises one of these with the value and the limit in
the message; ``assert`` is for our own invariants only.
"""

from __future__ import annotations


class FathomError(Exception):
    """Base of the tree; ``str(error)`` is one line that a user can act on."""


class ConfigError(FathomError):
    """A flag or an environment that cannot work. Ends the start with exit code 2."""


class CheckpointError(FathomError):
    """A checkpoint that is missing, damaged or not understood. Ends the start with exit code 2."""


class RequestError(FathomError):
    """A request that cannot be served; ``status`` and the fields below fill the error envelope."""

    status = 400
    error_type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(RequestError):
    """The request itself is wrong (HTTP 400)."""


class ContextLengthExceeded(BadRequest):
    """Prompt and limit, both numbers in the message (HTTP 400)."""

    code = "context_length_exceeded"

    def __init__(self, num_tokens: int, limit: int, *, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens, but the prompt has "
            f"{num_tokens} tokens and needs room for at least one more. Shorten the prompt.",
            param=param,
        )
        self.num_tokens = num_tokens
        self.limit = limit


class ModelNotFound(RequestError):
    """An unknown model name (HTTP 404)."""

    status = 404
    code = "model_not_found"


class QueueFull(RequestError):
    """More requests than the queue holds (HTTP 429 with Retry-After)."""

    status = 429
    error_type = "rate_limit_error"
    code = "rate_limit_exceeded"


class EngineDead(RequestError):
    """The engine process is gone or failing (HTTP 503)."""

    status = 503
    error_type = "server_error"
    code = "engine_unavailable"


class QueueTimeout(RequestError):
    """A request that waited too long for its turn (HTTP 503 with Retry-After)."""

    status = 503
    error_type = "server_error"
    code = "queue_timeout"


class Quarantined(RequestError):
    """A prompt that ended the engine process twice (HTTP 500; it must not be sent again)."""

    status = 500
    error_type = "server_error"
    code = "prompt_quarantined"
