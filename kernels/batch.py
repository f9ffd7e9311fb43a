"""The one description of a step's sequences that every attention op takes as an argument."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the tokens of one step sit in their sequences and in the page pool.

    Sequences with a single new token come first: sequence ``i < num_decodes`` owns exactly the
    token row ``i``. Tokens of a sequence are consecutive rows in position order. All tensors are on
    the model's device.
    """

    positions: Tensor  # [num_tokens] int64, position of each token in its sequence
    slot_mapping: Tensor  # [num_tokens] int64, page_id * page_size + offset; -1: not written
    cu_seqlens_q: Tensor  # [num_seqs + 1] int32, first row of each sequence, then the total
    context_lens: Tensor  # [num_seqs] int32, tokens in the cache once this step's are written
    block_table: Tensor  # [num_seqs, max_pages] int32, in position order; then any valid id
    num_decodes: int
    max_query_len: int  # longest chunk of the step
    max_context_len: int  # longest context of the step
    min_chunk_context_len: int  # shortest context of those that are no decodes; 0: all are

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]
