"""Messages between the server process and the engine process: framing, and what a message holds.

A frame is a 4-byte big-endian length and that many bytes of JSON. Both ends are ours, but a length
above `MAX_FRAME_BYTES` is refused before anything is allocated for it.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

from runtime.engine_config import EngineInfo
from runtime.errors import CheckpointError, ConfigError, EngineDead, FathomError
from runtime.grammar import Grammar
from runtime.request import FinishReason, SamplingParams, TokenEvent, TokenLogprobs

MAX_FRAME_BYTES = 64 << 20
HEADER = struct.Struct(">I")

Message = dict[str, Any]


Field = TypeVar("Field")


class WireError(Exception):
    """The other end sent something that cannot be a frame, or not what the frame should hold."""


def encode(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes is above the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def body_length(header: bytes | bytearray) -> int:
    """Length of the body that follows. Raises `WireError` if it is above the limit."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes is above the limit of {MAX_FRAME_BYTES}")
    return int(length)


def decode(body: bytes) -> Message:
    """Raises `WireError` for what is not a JSON object."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError(f"a frame of {len(body)} bytes does not hold JSON") from None
    if not isinstance(message, dict):
        raise WireError("a frame does not hold an object")
    return message


def field(message: Message, name: str, kind: type[Field]) -> Field:
    """The value under ``name``. Raises `WireError` if it is not there or of another kind."""
    value = message.get(name)
    if not isinstance(value, kind):
        raise WireError(f"a message of type {message.get('type')!r:.40} has no good {name!r}")
    return value


def moment(message: Message) -> float:
    """When what the message tells of happened, in seconds of the monotonic clock; now if unsaid."""
    value = message.get("at")
    return value if isinstance(value, float) else time.monotonic()


def take_messages(received: bytearray) -> Iterator[Message]:
    """Remove every whole message from the front of what has arrived. Raises `WireError`."""
    while len(received) >= HEADER.size:
        end = HEADER.size + body_length(received[: HEADER.size])
        if len(received) < end:
            return
        body = bytes(received[HEADER.size : end])
        del received[:end]
        yield decode(body)


def receive(sock: socket.socket) -> Message | None:
    """The next message of a blocking socket, or None once the other end is gone.

    Raises `WireError`.
    """
    header = _read_exactly(sock, HEADER.size)
    if header is None:
        return None
    body = _read_exactly(sock, body_length(header))
    return None if body is None else decode(body)


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def pack_params(params: SamplingParams) -> Message:
    """Only what differs from the defaults: most requests set three fields of fifteen."""
    return {name: value for name, value in asdict(params).items() if value != _DEFAULTS[name]}


_DEFAULTS = asdict(SamplingParams())


def unpack_params(raw: Message) -> SamplingParams:
    """Raises `WireError`, and `BadRequest` for a value out of its range."""
    fields = dict(raw)
    try:
        for name in ("stop", "stop_token_ids"):
            if name in fields:
                fields[name] = tuple(fields[name])
        if "logit_bias" in fields:
            fields["logit_bias"] = tuple((token_id, bias) for token_id, bias in raw["logit_bias"])
        if fields.get("grammar") is not None:
            fields["grammar"] = Grammar(**fields["grammar"])
        return SamplingParams(**fields)
    except (TypeError, ValueError) as error:
        raise WireError(f"these are no sampling parameters: {error}") from None


def pack_events(events: Iterable[TokenEvent]) -> list[list[Any]]:
    packed = []
    for event in events:
        row: list[Any] = [event.seq_id, event.token_id, event.finish_reason]
        if event.prompt_logprobs:
            row += [None, None, [(one.logprob, one.top) for one in event.prompt_logprobs]]
        elif event.logprobs is not None:
            row += [event.logprobs.logprob, event.logprobs.top]
        packed.append(row)
    return packed


def unpack_events(rows: list[list[Any]]) -> list[TokenEvent]:
    """Raises `WireError`."""
    events = []
    try:
        for seq_id, token_id, reason, *rest in rows:
            logprobs: TokenLogprobs | None = None
            prompt_logprobs: tuple[TokenLogprobs, ...] = ()
            if len(rest) == 3:
                prompt_logprobs = tuple(_logprobs(*row) for row in rest[2])
            elif rest:
                logprobs = _logprobs(*rest)
            finish_reason = None if reason is None else FinishReason(reason)
            event = TokenEvent(int(seq_id), token_id, finish_reason, logprobs, prompt_logprobs)
            events.append(event)
    except (TypeError, ValueError, IndexError) as error:
        raise WireError(f"these are no events: {error}") from None
    return events


def _logprobs(logprob: float, top: list[list[Any]]) -> TokenLogprobs:
    return TokenLogprobs(logprob, tuple((token_id, value) for token_id, value in top))


def unpack_failure(message: Message) -> FathomError:
    """Why an engine does not load; `EngineDead` for any other kind. Raises `WireError`."""
    kinds = {kind.__name__: kind for kind in (ConfigError, CheckpointError)}
    kind = kinds.get(field(message, "kind", str), EngineDead)
    return kind(field(message, "text", str))


def unpack_started(rows: list[list[Any]]) -> list[tuple[int, int]]:
    """``(seq_id, num_cached)`` of sequences that run for the first time. Raises `WireError`."""
    try:
        return [(int(seq_id), int(num_cached)) for seq_id, num_cached in rows]
    except (TypeError, ValueError) as error:
        raise WireError(f"these are no sequences: {error}") from None


def unpack_info(raw: Message) -> EngineInfo:
    """Raises `WireError`."""
    try:
        return EngineInfo.from_dict(raw)
    except (KeyError, TypeError) as error:
        raise WireError(f"this is no engine's description: {error}") from None
