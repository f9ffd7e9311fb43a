"""Finds the control tokens that a client's text spells, and keeps them from being encoded as such.

A *control token* is an added token that steers the model, such as ``<｜User｜>`` or ``<think>``.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import tokenizers

from runtime.errors import BadRequest

THINK_START, THINK_END = "<think>", "</think>"
MAX_SPELT = 4096  # in one text of a client; each is encoded apart
MAX_ROUNDS = 16  # a token inside a token inside a token
MAX_CHARS = 64  # of a spelling; the longest of a release has 28
MAX_DEPTH = 64  # of what a client gives the template


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        controls = list(filter(_is_control, backend.get_added_tokens_decoder().values()))
        spellings = [token.content for token in controls]
        self._normalizer = backend.normalizer
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        # what could become a spelling with more text behind it
        self._starts = frozenset(
            spelling[:end] for spelling in spellings for end in range(1, len(spelling))
        )
        self._finder = _make_finder(backend, controls)

    def marked(self, value: Any, mark: str, depth: int = 0) -> Any:
        """A copy of ``value`` with ``mark`` inside every spelling in its texts, keys included.

        No control token is left between two marks, nor in what follows of texts that are joined.
        Raises `BadRequest` for too much nesting, too many spellings, or text that is not Unicode.
        """
        if isinstance(value, str):
            return self._marked_text(value, mark)
        if not isinstance(value, list | tuple | dict):
            return value
        if depth == MAX_DEPTH:
            raise BadRequest(
                f"a message, tool or variable is nested deeper than {MAX_DEPTH} levels",
                param="messages",
                code="invalid_value",
            )
        if isinstance(value, dict):
            return {
                self.marked(key, mark): self.marked(item, mark, depth + 1)
                for key, item in value.items()
            }
        return [self.marked(item, mark, depth + 1) for item in value]

    def _marked_text(self, text: str, mark: str) -> str:
        require_unicode(text, "messages")
        spelt = itertools.islice(self._spelling.finditer(text), MAX_SPELT + 1)
        if sum(1 for _ in spelt) > MAX_SPELT:
            raise BadRequest(
                f"a text spells more than {MAX_SPELT} control tokens, such as <think>",
                param="messages",
                code="invalid_value",
            )
        rounds = 0
        while starts := self._positions(text):
            rounds += 1
            if rounds > MAX_ROUNDS:
                raise BadRequest(
                    "the model's tokenizer makes control tokens of this text however it is split",
                    param="messages",
                    code="tokenizer_error",
                )
            pieces = [text[a + 1 : b + 1] for a, b in zip([-1, *starts], starts, strict=False)]
            text = mark.join([*pieces, text[starts[-1] + 1 :]])
        # the text behind it could complete a control token that this one begins
        return text + mark if self._begins_one(text) else text

    def _begins_one(self, text: str) -> bool:
        tail = text[-MAX_CHARS:]
        ends = {tail[i:] for i in range(len(tail))}
        if self._normalizer is not None:
            tail = self._normalizer.normalize_str(tail)
            ends |= {tail[i:] for i in range(len(tail))}
        return not ends.isdisjoint(self._starts)

    def _positions(self, text: str) -> list[int]:
        [encoding] = self._finder.encode_batch([text])
        spans = zip(encoding.offsets, encoding.ids, strict=True)
        return [start for (start, _), token_id in spans if token_id > 0]


def _is_control(token: tokenizers.AddedToken) -> bool:
    text = token.content
    return len(text) > 1 and (token.special or "｜" in text or bool(re.fullmatch(r"<\S+", text)))


def _make_finder(
    backend: tokenizers.Tokenizer, controls: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """A tokenizer that knows the control tokens only (ids from 1) and calls all else 0.

    It finds all their spellings in linear time, by the rules of the real tokenizer.
    """
    finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    if backend.normalizer is not None:
        finder.normalizer = backend.normalizer
    finder.add_tokens(
        [tokenizers.AddedToken(token.content, normalized=token.normalized) for token in controls]
    )
    return finder


def require_unicode(text: str, param: str) -> None:
    """Raises `BadRequest` for text with lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BadRequest(
            f"{param} holds the lone surrogate U+{code:04X}, which is not valid Unicode",
            param=param,
            code="invalid_value",
        ) from None
