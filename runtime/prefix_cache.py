"""Which pages a sequence's tokens begin with, and which it adds for later ones.

Pages are published only once the step that filled them was committed: what a step under way writes
may still turn out not to be finite.
"""

from __future__ import annotations

from runtime.blocks import PagePool, Prefix, extend_key, root_key
from runtime.request import Sequence


class PrefixCache:
    """The published pages of a `PagePool`, by the tokens of sequences."""

    def __init__(self, pool: PagePool, page_size: int, model: str) -> None:
        self._pool = pool
        self._page_size = page_size
        self._model = model

    def find(self, seq: Sequence) -> list[int]:
        """The published pages that a sequence's tokens begin with.

        Its last two tokens are computed in any case: one alone would run as a decode
        (`Scheduler._part`). So are those that tell the logprobs of the prompt: a page has none.
        """
        limit = seq.num_tokens - 2
        if seq.num_to_score:
            limit = min(limit, seq.num_scored)
        page_ids: list[int] = []
        for index in range(limit // self._page_size):
            page_id = self._pool.find(self._prefix(seq, index))
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def publish(self, seq: Sequence, end: int) -> None:
        """Let the pages of a sequence be found that its tokens [0, end) fill; it has them still."""
        for index in range(seq.num_published, end // self._page_size):
            self._pool.publish(seq.block_table[index], self._prefix(seq, index))
            seq.num_published = index + 1

    def _prefix(self, seq: Sequence, index: int) -> Prefix:
        """Of the sequence's page ``index``, which is full of known tokens."""
        while len(seq.prefixes) <= index:
            start = len(seq.prefixes) * self._page_size
            token_ids = seq.token_range(start, start + self._page_size)
            parent = seq.prefixes[-1].key if start else root_key(self._model, seq.namespace)
            seq.prefixes.append(extend_key(parent, token_ids))
        return seq.prefixes[index]
