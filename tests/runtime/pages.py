"""Runs a model's steps on hand-made pages, below the engine."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from kernels.batch import PagedBatch
from runtime.models import CausalLM
from runtime.models.layers import Fp8Format, Placement
from runtime.weights import build_model, inspect_checkpoint, load_weights

PAGE_SIZE = 8
NUM_PAGES = 128


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    fp8: Fp8Format | None = None,
    ignore_attn_factor: bool = False,
    batch_invariant: bool = False,
) -> CausalLM:
    checkpoint = inspect_checkpoint(folder, ignore_attn_factor=ignore_attn_factor)
    model = build_model(checkpoint, Placement(torch.device("cpu"), dtype, fp8, batch_invariant))
    load_weights(checkpoint, model)
    return model


class Pages:
    """Caches full of NaN and, per sequence, pages in no order; runs steps of chunks on a model."""

    def __init__(self, model: CausalLM, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.caches = [
            {
                name: torch.full((NUM_PAGES, PAGE_SIZE, *shape), math.nan, dtype=dtype)
                for name, shape in layer.items()
            }
            for layer in model.cache_spec()
        ]
        generator = torch.Generator().manual_seed(1)
        self.free = torch.randperm(NUM_PAGES, generator=generator).tolist()
        self.tables: dict[int, list[int]] = {}

    def step(self, *chunks: tuple[int, list[int], int, int]) -> list[Tensor]:
        """Chunks are (sequence, its tokens, start, end), single tokens first; logits of each."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for seq_id, tokens, start, end in chunks:
            table = self.tables.setdefault(seq_id, [])
            while len(table) * PAGE_SIZE < end:
                table.append(self.free.pop())
            ids += tokens[start:end]
            positions += range(start, end)
            slots += [table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
        lens = [end - start for _, _, start, end in chunks]
        context_lens = [end for _, _, _, end in chunks]
        width = -(-max(context_lens) // PAGE_SIZE)
        tables = [(self.tables[chunk[0]] + [0] * width)[:width] for chunk in chunks]
        batch = PagedBatch(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            block_table=torch.tensor(tables, dtype=torch.int32),
            num_decodes=sum(1 for length in lens if length == 1),
            max_query_len=max(lens),
            max_context_len=max(context_lens),
            min_chunk_context_len=min(
                (end for _, _, start, end in chunks if end - start > 1), default=0
            ),
        )
        with torch.inference_mode():
            hidden = self.model.forward(torch.tensor(ids), batch, self.caches)
            return list(self.model.logits(hidden).split(lens))


def reference_logits(folder: Path, tokens: list[int]) -> Tensor:
    """[num_tokens, vocab] of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0]


def random_tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
