"""A choice of a chat request as it grows: what the chunks say of its text, thought and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from api.answer import Choice, Part, finite
from runtime import TextPiece, TokenEvent, Tokenizer, ToolDelta


@dataclass(slots=True)
class ChatChoice(Choice):
    """A choice whose thought and calls are told apart from its text."""

    def opening(self) -> list[Part]:
        """The role, which is said once."""
        return [self._part({"role": "assistant", "content": ""})]

    def grow(self, events: Sequence[TokenEvent]) -> list[Part]:
        """As of any choice."""
        return [self._part(_delta(piece), self._logprobs_of(piece)) for piece in self.take(events)]

    def closing(self) -> Part:
        """As of any choice."""
        return {**self._part({}), "finish_reason": self.finish_reason}

    def _part(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> Part:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs_of(self, piece: TextPiece) -> dict[str, Any] | None:
        """The ``logprobs`` object of a piece; a thought's tokens have a list of their own."""
        if not self.logprobs:
            return None
        entries = [
            {
                **_logprob_entry(self.tokenizer, token_id, logprobs.logprob),
                "top_logprobs": [_logprob_entry(self.tokenizer, *top) for top in logprobs.top],
            }
            for token_id, logprobs in (self.logprobs[index] for index in piece.token_indices)
        ]
        if piece.kind == "reasoning":
            return {"content": None, "reasoning_content": entries, "refusal": None}
        return {"content": entries, "refusal": None}


def _delta(piece: TextPiece) -> dict[str, Any]:
    if piece.call is not None:
        return {"tool_calls": [_call_delta(piece.call)]}
    if piece.kind == "reasoning":  # DeepSeek's clients read the first, vLLM's the second
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    return {"content": piece.text}


def _call_delta(call: ToolDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprob_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes[token_id]
    return {
        "token": data.decode(errors="replace"),
        "logprob": finite(logprob),
        "bytes": list(data),
    }
