"""Frames between the two processes: what goes in comes out, and lies about length are refused."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import BadRequest, wire
from runtime.request import FinishReason, SamplingParams, TokenEvent, TokenLogprobs

finite = st.floats(-100, 0)
params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 10**6),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 1000),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(st.integers(0, 99), finite), max_size=3).map(tuple),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4).map(
        tuple
    ),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
events_strategy = st.builds(
    TokenEvent,
    seq_id=st.integers(0, 2**40),
    token_id=st.none() | st.integers(0, 200_000),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    logprobs=st.none()
    | st.builds(
        TokenLogprobs,
        finite,
        st.lists(st.tuples(st.integers(0, 99), finite), max_size=5).map(tuple),
    ),
)


def through_a_socket(message: wire.Message) -> wire.Message | None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(wire.encode(message))
        return wire.receive(right)


@given(params_strategy)
def test_sampling_params_survive_the_wire(params: SamplingParams) -> None:
    message = through_a_socket({"params": wire.pack_params(params)})
    assert message is not None
    assert wire.unpack_params(message["params"]) == params


@given(st.lists(events_strategy, max_size=5))
def test_events_survive_the_wire(events: list[TokenEvent]) -> None:
    message = through_a_socket({"events": wire.pack_events(events)})
    assert message is not None
    assert wire.unpack_events(message["events"]) == events


def test_a_closed_or_cut_stream_ends_in_none() -> None:
    for data in (b"", b"\0\0", struct.pack(">I", 10) + b"{}"):
        left, right = socket.socketpair()
        with right:
            left.sendall(data)
            left.close()
            assert wire.receive(right) is None


def test_a_length_above_the_limit_is_refused_before_reading() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))
        with pytest.raises(wire.WireError, match="above the limit"):
            wire.receive(right)
    with pytest.raises(wire.WireError, match="above the limit"):
        wire.encode({"text": "x" * (wire.MAX_FRAME_BYTES + 1)})


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.integers()), max_size=6),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_messages_come_out_whole_however_the_bytes_are_cut(
    messages: list[dict[str, int]], cuts: list[int]
) -> None:
    data = b"".join(map(wire.encode, messages))
    received, out = bytearray(), []
    for cut in itertools.cycle(cuts):
        received += data[:cut]
        data = data[cut:]
        out += wire.take_messages(received)
        if not data:
            break
    assert out == messages
    assert not received


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=8))
def test_odd_contents_are_refused_as_such(value: object) -> None:
    """Never by another exception, whatever the JSON holds."""
    for unpack in (wire.unpack_events, wire.unpack_started):
        with contextlib.suppress(wire.WireError):
            unpack([value])  # type: ignore[operator]
    for raw in ({"stop": value}, {"logit_bias": value}, {"heat": value}):
        with contextlib.suppress(wire.WireError, BadRequest):
            wire.unpack_params(raw)
    with pytest.raises(wire.WireError):
        wire.unpack_info({"model": value})
    with pytest.raises(wire.WireError):
        wire.field({"type": value, "seq_id": value}, "seq_id", dict)
