"""What the kernel benchmarks share: cases, sizes, and random inputs on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import random_models
from benchmarks.timing import Call
from kernels.batch import PagedBatch
from kernels.quant import ActivationScale, Fp8Weight, num_blocks
from kernels.rope import default_inv_freq, rotary_table

OURS, TORCH, INVARIANT = "ours", "torch", "invariant"
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed: the calls by name for each set of inputs, and what one call must do."""

    sets: list[dict[str, Call]]
    num_bytes: float
    flops: float = 0.0

    def calls(self) -> dict[str, list[Call]]:
        return {name: [calls[name] for calls in self.sets] for name in self.sets[0]}


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape; ``at`` is what varies along a line of the table."""

    op: str
    model: str
    shape: str
    at: str
    prepare: Callable[[], Work]


@dataclass(frozen=True, slots=True)
class Grid:
    """Which sizes are measured."""

    rows: tuple[int, ...]  # of a decode step
    prompt_rows: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    expert_rows: tuple[int, ...]


FULL = Grid(
    (1, 2, 4, 8, 16, 32, 64), 2048, (1, 8, 64), (1024, 8192, 32768), (2048, 8192), (1, 8, 64, 512)
)
TINY = Grid((1, 3), 8, (1, 2), (32, 40), (24,), (1, 5))


@dataclass(frozen=True, slots=True)
class Maker:
    """Draws inputs on a device, of the sizes of released models or of tiny ones."""

    device: torch.device
    dtype: torch.dtype
    grid: Grid
    tiny: bool

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(0.0, scale)

    def config(self, model: str) -> dict[str, Any]:
        return random_models.config_json(model, tiny=self.tiny)

    def fp8(self, out: int, size: int, activations: ActivationScale | None) -> Fp8Weight:
        values = torch.empty(out, size, device=self.device).normal_(0.0, 50.0)
        blocks = num_blocks(out), num_blocks(size)
        return Fp8Weight(
            values=values.clamp_(-448, 448).to(torch.float8_e4m3fn),
            scale_inv=torch.rand(blocks, device=self.device) * 1e-3 + 1e-3,
            scale_rows=(torch.arange(out, device=self.device) // 128).to(torch.int32),
            activations=activations,
        )

    def heads(self, model: str) -> tuple[int, int, int]:
        """Query heads, key-value heads and their size."""
        config = self.config(model)
        num_heads = config["num_attention_heads"]
        return num_heads, config["num_key_value_heads"], config["hidden_size"] // num_heads

    def latent_heads(self, model: str) -> tuple[int, int, int, int, int]:
        """Heads of latent attention, the rank, and the sizes nope, rope and v of a head."""
        config = self.config(model)
        names = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        num_heads, rank, nope, rope = (config[name] for name in names)
        return num_heads, rank, nope, rope, config["v_head_dim"]

    def rotations(self, dim: int, num_positions: int) -> Tensor:
        return rotary_table(default_inv_freq(dim, 10000.0), num_positions, 1.0, self.device)

    def num_pages(self, *batches: PagedBatch) -> int:
        return sum(batch.block_table.numel() for batch in batches)

    def rotated_decodes(self, size: int, context: int, count: int) -> list[PagedBatch]:
        """Steps that read different pages of the same caches."""
        per_seq = -(-context // PAGE_SIZE)
        order = torch.randperm(count * size * per_seq, device=self.device).to(torch.int32)
        tables = order.view(count, size, per_seq)
        return [self.decodes(size, context, table) for table in tables]

    def decodes(self, size: int, context: int, table: Tensor | None = None) -> PagedBatch:
        """``size`` decodes whose new token is the last of ``context``."""
        per_seq = -(-context // PAGE_SIZE)
        if table is None:
            order = torch.randperm(size * per_seq, device=self.device).to(torch.int32)
            table = order.view(size, per_seq)
        positions = torch.full((size,), context - 1, device=self.device)
        last_pages = table[:, (context - 1) // PAGE_SIZE].long()
        return PagedBatch(
            positions=positions,
            slot_mapping=last_pages * PAGE_SIZE + positions % PAGE_SIZE,
            cu_seqlens_q=torch.arange(size + 1, device=self.device, dtype=torch.int32),
            context_lens=torch.full((size,), context, device=self.device, dtype=torch.int32),
            block_table=table,
            num_decodes=size,
            max_query_len=1,
            max_context_len=context,
            min_chunk_context_len=0,
        )

    def chunk(self, num_tokens: int) -> PagedBatch:
        """One prompt from its first token."""
        per_seq = -(-num_tokens // PAGE_SIZE)
        table = torch.randperm(per_seq, device=self.device).to(torch.int32)
        positions = torch.arange(num_tokens, device=self.device)
        pages = table[positions // PAGE_SIZE].long()
        return PagedBatch(
            positions=positions,
            slot_mapping=pages * PAGE_SIZE + positions % PAGE_SIZE,
            cu_seqlens_q=torch.tensor([0, num_tokens], device=self.device, dtype=torch.int32),
            context_lens=torch.tensor([num_tokens], device=self.device, dtype=torch.int32),
            block_table=table.view(1, per_seq),
            num_decodes=0,
            max_query_len=num_tokens,
            max_context_len=num_tokens,
            min_chunk_context_len=num_tokens,
        )


def short(num_tokens: int) -> str:
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else str(num_tokens)
