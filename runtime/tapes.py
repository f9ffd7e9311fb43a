"""Decode steps of a CPU whose every op is a compiled loop: recorded once, replayed without Python.

A tape is made for a number of sequences when such a step first comes up, with its own inputs. Where
torch has a part in a step (a model or a dtype that has no loops for all, more rows than they take,
longer contexts), it runs as it did.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.attention_sdpa import native_keys
from kernels.batch import PagedBatch
from kernels.dispatch import native
from runtime.models import CausalLM

if TYPE_CHECKING:
    from kernels.native_tape import Tape

MAX_SEQS = 16
"""No loop multiplies more rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Recorded:
    token_ids: Tensor
    batch: PagedBatch
    tape: Tape


class DecodeTapes:
    """The forward pass of one model with its caches, replayed for steps that were recorded."""

    def __init__(self, caches: list[dict[str, Tensor]]) -> None:
        self._caches = caches
        self._max_keys = _max_keys(caches)
        self._recorded: dict[int, _Recorded | None] = {}  # by sequences; None: cannot be
        self._arena = native("tape").Arena() if self._max_keys else None

    def forward(self, model: CausalLM, token_ids: Tensor, batch: PagedBatch) -> Tensor:
        """``model.forward``; what it returns lasts until the next."""
        num_seqs = batch.num_seqs
        is_usual = batch.num_decodes == num_seqs and batch.max_context_len <= self._max_keys
        if not is_usual or num_seqs > MAX_SEQS:
            return model.forward(token_ids, batch, self._caches)
        # with other threads since, fewer keys may be the loops'
        can_record = num_seqs not in self._recorded and _max_keys(self._caches) == self._max_keys
        if can_record:
            return self._record(model, token_ids, batch)
        recorded = self._recorded.get(num_seqs)
        if recorded is None:
            return model.forward(token_ids, batch, self._caches)
        recorded.token_ids.copy_(token_ids)
        kept = recorded.batch
        kept.positions.copy_(batch.positions)
        kept.slot_mapping.copy_(batch.slot_mapping)
        kept.context_lens.copy_(batch.context_lens)
        kept.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
        recorded.tape.replay()
        return recorded.tape.result

    def _record(self, model: CausalLM, token_ids: Tensor, batch: PagedBatch) -> Tensor:
        num_pages = -(-self._max_keys // self._caches[0]["k"].shape[1])
        block_table = batch.block_table.new_zeros((batch.num_seqs, num_pages))
        block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
        token_ids = token_ids.clone()
        kept = dataclasses.replace(
            batch,
            positions=batch.positions.clone(),
            slot_mapping=batch.slot_mapping.clone(),
            cu_seqlens_q=batch.cu_seqlens_q.clone(),
            context_lens=batch.context_lens.clone(),
            block_table=block_table,
            max_context_len=self._max_keys,
        )
        hidden: Tensor
        hidden, tape = native("tape").record(
            lambda: model.forward(token_ids, kept, self._caches), self._arena
        )
        self._recorded[batch.num_seqs] = None if tape is None else _Recorded(token_ids, kept, tape)
        return hidden


def _max_keys(caches: list[dict[str, Tensor]]) -> int:
    """Up to how many keys every layer attends in compiled loops."""
    return min(native_keys(layer["k"]) if "k" in layer else 0 for layer in caches)
