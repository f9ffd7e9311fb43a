"""How few tokens a text can have, found without encoding it.

Encoding takes about 1.5 s and 300 MB per megabyte. A prompt that is far too long is refused by this
bound instead, which reads no more of it than the context has room for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from runtime.errors import BadRequest, ContextLengthExceeded

SLICE_CHARS = 1 << 14  # counted at once: a slice takes some MB
LOSSLESS_STEPS = frozenset({"Split", "Digits", "Punctuation", "ByteLevel"})


class PromptTooLong(ContextLengthExceeded):
    """A prompt that was refused before its tokens were counted (HTTP 400)."""

    def __init__(self, at_least: int, limit: int, *, param: str = "messages") -> None:
        BadRequest.__init__(
            self,
            f"This model's maximum context length is {limit} tokens, but the prompt has at least "
            f"{at_least} tokens and needs room for at least one more. Shorten the prompt.",
            param=param,
        )
        self.num_tokens = at_least
        self.limit = limit


class TokenBound:
    """A lower bound on the tokens of a text, whatever merges and splits its tokenizer knows.

    The tokens of a text, put together, are its bytes, so they are at least as many as the fewest
    tokens that cover these bytes. A unigram model whose tokens all score the same finds those.

    A text is covered slice by slice. The tokens inside a slice leave less than the longest token
    uncovered at either end, and every byte is a token of its own. So a slice that needs ``c``
    tokens has at least ``c - 2 * (longest - 1)`` inside it, and no token is inside two slices.
    """

    def __init__(self, backend: tokenizers.Tokenizer, token_bytes: Sequence[bytes]) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=False)
        self._is_known = _is_lossless(backend) and vocabulary.keys() >= set(byte_letters())
        self._token_bytes = token_bytes
        self._lost = 2 * (max(map(len, token_bytes), default=1) - 1)
        self._building = threading.Lock()
        self._built: tokenizers.Tokenizer | None = None

    @property
    def _cover(self) -> tokenizers.Tokenizer:
        """Made when it is first needed: for 128,000 tokens it takes 0.7 s and 280 MB."""
        with self._building:
            if self._built is None:
                letters = byte_letters()
                pieces = {"".join(map(letters.__getitem__, token)) for token in self._token_bytes}
                scored = [(piece, -1.0) for piece in sorted(pieces - {""})]
                cover = tokenizers.Tokenizer(tokenizers.models.Unigram(scored, None, False))
                cover.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
                    add_prefix_space=False, use_regex=False
                )
                self._built = cover
            return self._built

    def fewest(self, text: str, enough: int) -> int:
        """A lower bound; no more of ``text`` is read once it reaches ``enough``.

        0 for a tokenizer that can drop text, of which nothing is known.
        """
        if not self._is_known:
            return 0
        cover = self._cover
        num_tokens = 0
        for start in range(0, len(text), SLICE_CHARS):
            # Batches, unlike single texts, are encoded without Python's lock.
            [covered] = cover.encode_batch_fast([text[start : start + SLICE_CHARS]])
            num_tokens += max(len(covered) - self._lost, 0)
            if num_tokens >= enough:
                break
        return num_tokens

    def check(self, text: str, max_model_len: int, *, param: str = "messages") -> None:
        """Raises `PromptTooLong` if the text cannot leave room for one more token."""
        num_tokens = self.fewest(text, max_model_len)
        if num_tokens >= max_model_len:
            raise PromptTooLong(num_tokens, max_model_len, param=param)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary.

    GPT-2's map: printable Latin-1 stands for itself, the rest from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def _is_lossless(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of every text, put together, are at least all its bytes."""
    if any(_steps(backend.normalizer, "normalizers")):
        return False
    steps = _steps(backend.pre_tokenizer, "pretokenizers")
    kinds = {step.get("type") for step in steps}
    added = backend.get_added_tokens_decoder().values()
    return (
        "ByteLevel" in kinds
        and kinds <= LOSSLESS_STEPS
        and all(step.get("behavior") != "Removed" for step in steps)
        and not any(token.lstrip or token.rstrip for token in added)
        and not backend.model.continuing_subword_prefix
        and not backend.model.end_of_word_suffix
    )


def _steps(part: Normalizer | PreTokenizer | None, name: str) -> list[dict[str, object]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""
    pending = [] if part is None else [json.loads(part.__getstate__())]
    steps = []
    while pending:
        step = pending.pop()
        if step.get("type") == "Sequence":
            pending += step[name]
        else:
            steps.append(step)
    return steps
