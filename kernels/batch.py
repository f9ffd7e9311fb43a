"""The one description of a step's sequences that every attention op takes as an argument."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the tokens of one step sit in their sequences and in the page pool.

    Sequences with a single new token come first: sequence ``i < num_decodes`` owns exactly the
    token row ``i``. Tokens of a sequence are consecutive rows in position order. All tensors are on
    the model's device, and nobody writes to them while the step runs. What layers have in common
    may be worked out `once`; a copy made by ``dataclasses.replace`` starts anew.
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
    _plans: dict[Hashable, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def once(self, work: Callable[..., Plan], *args: Hashable) -> Plan:
        """``work(self, *args)``: of the first layer that asks, kept for the others of the step."""
        key = (work, *args)
        if key not in self._plans:
            self._plans[key] = work(self, *args)
        plan: Plan = self._plans[key]
        return plan

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]
