"""The wall around one request: what goes wrong inside ends that request and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from api.errors import internal_error
from api.guard import log_fault
from api.sse import ClientGone
from runtime import RequestError


@contextlib.contextmanager
def contained(request_id: str) -> Iterator[None]:
    """Log whatever a block raises besides errors meant for the client, and raise `HttpError` 500.

    Panics of native libraries are `BaseException`s, and a template may raise anything at all.
    """
    try:
        yield
    except (RequestError, ClientGone, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        log_fault(request_id, error)
        raise internal_error() from None
