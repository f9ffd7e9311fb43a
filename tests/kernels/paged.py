"""Ragged paged cases for the attention tests, and attention in float64 without pages to judge by.

A case scatters every sequence over shuffled pages; whatever no sequence owns holds NaN, so a body
that reads a free slot or a free page shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from tests.kernels.passes import INTERPRETED

# (new tokens, context) of the sequences of a step; decodes come first
LENGTHS = {
    "decodes": [(1, 1), (1, 7), (1, 8), (1, 9), (1, 261), (1, 515), (1, 64), (1, 65)],
    "chunks": [(1, 3), (5, 5), (17, 90), (70, 131)],
    "mixed": [(1, 300), (1, 1), (1, 257), (2, 33), (65, 65), (9, 270)],
}
if INTERPRETED:
    LENGTHS = {
        "decodes": [(1, 1), (1, 8), (1, 257)],
        "mixed": [(1, 257), (1, 9), (2, 17), (19, 40)],
    }


@dataclass(frozen=True)
class Pages:
    """One step's sequences over shuffled pages."""

    batch: PagedBatch
    num_pages: int
    page_size: int

    def scatter(self, tokens: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        """Pages of ``tokens`` [num_seqs, max_context, ...]; NaN where no token lies."""
        pages = torch.full((self.num_pages, self.page_size, *tokens.shape[2:]), float("nan"))
        for seq, context_len in enumerate(self.batch.context_lens.tolist()):
            at = torch.arange(context_len)
            ids = self.batch.block_table[seq].cpu()[at // self.page_size].long()
            pages[ids, at % self.page_size] = tokens[seq, :context_len].float()
        return pages.to(device, dtype)


def make_pages(lengths: list[tuple[int, int]], page_size: int, device: str, seed: int = 0) -> Pages:
    """Pages for sequences of (new tokens, context), shuffled by ``seed``."""
    query_lens = [query_len for query_len, _ in lengths]
    contexts = [context for _, context in lengths]
    counts = [-(-context // page_size) for context in contexts]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
    # past the context: a page that no sequence owns
    table = torch.full((len(lengths), max(counts)), int(order[-1]), dtype=torch.int32)
    taken = 0
    for seq, count in enumerate(counts):
        table[seq, :count] = order[taken : taken + count]
        taken += count
    positions = [torch.arange(context - query, context) for query, context in lengths]
    slots = [
        table[seq, at // page_size].long() * page_size + at % page_size
        for seq, at in enumerate(positions)
    ]
    batch = PagedBatch(
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_table=table.to(device),
        num_decodes=sum(query_len == 1 for query_len in query_lens),
        max_query_len=max(query_lens),
        max_context_len=max(contexts),
        min_chunk_context_len=min((c for q, c in lengths if q > 1), default=0),
    )
    return Pages(batch, num_pages, page_size)


def select(batch: PagedBatch, seqs: list[int]) -> tuple[PagedBatch, Tensor]:
    """A step of some of the sequences, and the rows of their tokens in the whole step."""
    starts = batch.cu_seqlens_q.tolist()
    rows = [torch.arange(starts[seq], starts[seq + 1]) for seq in seqs]
    query_lens = torch.tensor([len(of_seq) for of_seq in rows])
    kept = torch.cat(rows).to(batch.positions.device)
    device = batch.positions.device
    return replace(
        batch,
        positions=batch.positions[kept],
        slot_mapping=batch.slot_mapping[kept],
        cu_seqlens_q=torch.cat((torch.zeros(1), query_lens)).cumsum(0).to(device, torch.int32),
        context_lens=batch.context_lens[seqs],
        block_table=batch.block_table[seqs],
        num_decodes=int((query_lens == 1).sum()),
        max_query_len=int(query_lens.max()),
        max_context_len=int(batch.context_lens[seqs].max()),
        min_chunk_context_len=min(batch.context_lens[seqs][query_lens > 1].tolist(), default=0),
    ), kept


def oracle_attention(
    q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """Token by token in float64.

    q [num_tokens, num_heads, dim], keys [num_seqs, max_context, num_kv_heads, dim], values alike.
    """
    group_size = q.shape[1] // keys.shape[2]
    starts = batch.cu_seqlens_q.tolist()
    out = []
    for seq in range(batch.num_seqs):
        for row in range(starts[seq], starts[seq + 1]):
            seen = int(batch.positions[row]) + 1
            k = keys[seq, :seen].double().repeat_interleave(group_size, dim=1)
            v = values[seq, :seen].double().repeat_interleave(group_size, dim=1)
            scores = torch.einsum("hd,khd->hk", q[row].double(), k) * scale
            out.append(torch.einsum("hk,khd->hd", scores.softmax(dim=-1), v))
    return torch.stack(out)  # [num_tokens, num_heads, v_dim]
