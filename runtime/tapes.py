"""Decode steps of a CPU whose every op is a compiled loop: recorded once, replayed without Python.

A tape is made for a number of sequences when such a step first comes up, with its own inputs. Where
torch has a part in a step (a model or a dtype that has no loops for all, more rows than they take,
longer contexts), it runs as it did.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.attention_sdpa import MAX_NATIVE_KEYS
from kernels.batch import PagedBatch
from kernels.dispatch import compiles_loops, native
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

    def __init__(self) -> None:
        self._recorded: dict[int, _Recorded | None] = {}  # by sequences; None: cannot be
        self._arena = native("tape").Arena() if compiles_loops() else None

    def forward(
        self,
        model: CausalLM,
        token_ids: Tensor,
        batch: PagedBatch,
        caches: list[dict[str, Tensor]],
    ) -> Tensor:
        """``model.forward``; what a replay returns lasts until the next."""
        num_seqs = batch.num_seqs
        is_usual = batch.num_decodes == num_seqs and batch.max_context_len <= MAX_NATIVE_KEYS
        if self._arena is None or not is_usual or num_seqs > MAX_SEQS:
            return model.forward(token_ids, batch, caches)
        if num_seqs not in self._recorded:
            return self._record(model, token_ids, batch, caches)
        recorded = self._recorded[num_seqs]
        if recorded is None:
            return model.forward(token_ids, batch, caches)
        recorded.token_ids.copy_(token_ids)
        kept = recorded.batch
        kept.positions.copy_(batch.positions)
        kept.slot_mapping.copy_(batch.slot_mapping)
        kept.context_lens.copy_(batch.context_lens)
        kept.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
        recorded.tape.replay()
        return recorded.tape.result

    def _record(
        self,
        model: CausalLM,
        token_ids: Tensor,
        batch: PagedBatch,
        caches: list[dict[str, Tensor]],
    ) -> Tensor:
        page_size = next(iter(caches[0].values())).shape[1]
        num_pages = -(-MAX_NATIVE_KEYS // page_size)
        block_table = batch.block_table.new_zeros((batch.num_seqs, num_pages))
        block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)
        token_ids = token_ids.clone()
        kept = dataclasses.replace(
            batch,
            positions=batch.positions.clone(),
            slot_mapping=batch.slot_mapping.clone(),
            context_lens=batch.context_lens.clone(),
            block_table=block_table,
            max_context_len=MAX_NATIVE_KEYS,
        )
        hidden: Tensor
        hidden, tape = native("tape").record(
            lambda: model.forward(token_ids, kept, caches), self._arena
        )
        self._recorded[batch.num_seqs] = None if tape is None else _Recorded(token_ids, kept, tape)
        return hidden
