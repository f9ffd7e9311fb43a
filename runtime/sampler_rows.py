"""Sampling parameters of the running sequences, one row each, and their token counts.

A step gathers its rows with a handful of numpy operations instead of Python per sequence. One row
more than there can be sequences belongs to padding: greedy, and neutral in everything else.
"""

from __future__ import annotations

import enum
import math
import traceback
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.sampling import SamplingBatch
from runtime.request import SamplingParams, Sequence
from runtime.scheduler import Chunk
from runtime.staging import Array


class Uses(enum.IntFlag):
    """What the sampling of a row takes; a step takes what its rows take together."""

    DRAW = enum.auto()  # temperature above 0; without it no filter counts
    TOP_K = enum.auto()
    TOP_P = enum.auto()
    MIN_P = enum.auto()
    PENALTIES = enum.auto()
    BIAS = enum.auto()
    LOGPROBS = enum.auto()
    CONSTRAINT = enum.auto()  # some of its tokens are masked


@dataclass(frozen=True, slots=True)
class SamplingKind:
    """What the host knows of a step's sampling; it picks kernels, and the graph to replay.

    ``any_filter``: some row uses top-k, top-p or min-p; the two after it say which.
    """

    all_greedy: bool
    any_filter: bool = False
    any_top_k: bool = False
    any_top_p: bool = False
    has_penalties: bool = False
    has_bias: bool = False
    has_mask: bool = False
    num_logprobs: int = -1

    @property
    def is_plain(self) -> bool:
        """Whether a captured graph may hold it: nothing but temperature and filters."""
        is_adjusted = self.has_penalties or self.has_bias or self.has_mask
        return not is_adjusted and self.num_logprobs < 0


class SamplerRows:
    """The rows, on the host, and the counts of generated tokens, on the device."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        num_rows = max_num_seqs + 1
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.presence = np.zeros(num_rows, np.float32)
        self.frequency = np.zeros(num_rows, np.float32)
        self.repetition = np.ones(num_rows, np.float32)
        self.seeds = np.zeros(num_rows, np.int64)
        self.num_logprobs = np.full(num_rows, -1, np.int32)
        self.uses = np.zeros(num_rows, np.uint8)  # flags of `Uses`
        self.output_counts: Tensor | None = None  # [num_rows, vocab], made when first needed

    def start(self, seq: Sequence) -> None:
        """Fill the row of a sequence that begins to run, also after a preemption."""
        params, row = seq.params, seq.row
        self.temperature[row] = params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.presence[row] = params.presence_penalty
        self.frequency[row] = params.frequency_penalty
        self.repetition[row] = params.repetition_penalty
        self.seeds[row] = seq.seed
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.uses[row] = _uses_of(params)
        if seq.constraint is not None:
            self.uses[row] |= np.uint8(Uses.CONSTRAINT)
        if params.has_penalties:
            if self.output_counts is None:
                shape = (len(self.seeds), self.vocab_size)
                self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            if not seq.output_ids:
                self.output_counts[row].zero_()
                return
            counts = np.bincount(seq.output_ids, minlength=self.vocab_size).astype(np.int32)
            host = torch.from_numpy(counts)
            host = host.pin_memory() if self.device.type == "cuda" else host
            self.output_counts[row].copy_(host, non_blocking=True)

    def kind_of(self, rows: Array, chunks: Seq[Chunk]) -> SamplingKind:
        """Of a step that samples for ``rows`` [num_sampled] int64, those of ``chunks``."""
        uses = int(np.bitwise_or.reduce(self.uses[rows]))
        has_mask = uses & Uses.CONSTRAINT and any(map(_is_masked, chunks))
        return SamplingKind(
            all_greedy=not uses & Uses.DRAW,
            any_filter=bool(uses & (Uses.TOP_K | Uses.TOP_P | Uses.MIN_P)),
            any_top_k=bool(uses & Uses.TOP_K),
            any_top_p=bool(uses & Uses.TOP_P),
            has_penalties=bool(uses & Uses.PENALTIES),
            has_bias=bool(uses & Uses.BIAS),
            has_mask=bool(has_mask),
            num_logprobs=int(self.num_logprobs[rows].max()) if uses & Uses.LOGPROBS else -1,
        )

    def arrays(self, rows: Array, positions: Array) -> dict[str, Array]:
        """What every step samples with; ``positions`` [num_sampled] are those of the new tokens."""
        return {
            "sample_rows": rows,
            "sample_positions": positions,
            "seeds": self.seeds[rows],
            "temperature": self.temperature[rows],
            "top_k": self.top_k[rows],
            "top_p": self.top_p[rows],
            "min_p": self.min_p[rows],
        }

    def extra_arrays(
        self,
        kind: SamplingKind,
        rows: Array,
        chunks: Seq[Chunk],
        eos_token_ids: frozenset[int],
    ) -> tuple[dict[str, Array], list[Sequence]]:
        """Masks, penalties and bias of a step that is not plain; ``chunks`` are those that sample.

        ``rows`` may be longer than ``chunks``: padding follows. The second part of the result are
        sequences whose mask could not be made; what the step draws for them means nothing.
        """
        arrays: dict[str, Array] = {}
        failed: list[Sequence] = []
        if kind.has_mask:
            masks, mask_rows = [np.full(-(-self.vocab_size // 32), -1, np.int32)], []
            for chunk in chunks:
                seq = chunk.seq
                if not _is_masked(chunk):
                    mask_rows.append(-1)
                    continue
                try:
                    assert seq.constraint is not None
                    banned = _banned_ids(chunk, eos_token_ids)
                    bitmask = seq.constraint.bitmask(seq.output_ids, banned)
                except Exception:
                    traceback.print_exc()
                    failed.append(seq)
                    mask_rows.append(-1)
                    continue
                mask_rows.append(len(masks))
                masks.append(bitmask)
            mask_rows += [-1] * (len(rows) - len(chunks))
            arrays["masks"] = np.stack(masks)
            arrays["mask_rows"] = np.array(mask_rows, np.int32)
        if kind.has_penalties:
            arrays["presence"] = self.presence[rows]
            arrays["frequency"] = self.frequency[rows]
            arrays["repetition"] = self.repetition[rows]
            is_padding = rows == len(self.seeds) - 1
            arrays["count_rows"] = np.where(is_padding, -1, rows)  # which counts nothing
        if kind.has_bias:
            entries = [_bias_of(chunk, eos_token_ids) for chunk in chunks]
            width = max(map(len, entries), default=0)
            ids = np.full((len(rows), max(width, 1)), -1, np.int64)
            values = np.zeros(ids.shape, np.float32)
            for index, (bias, chunk) in enumerate(zip(entries, chunks, strict=True)):
                if not bias and not _is_masked(chunk):  # min_tokens end for good
                    self.uses[chunk.seq.row] &= ~np.uint8(Uses.BIAS)
                ids[index, : len(bias)] = list(bias)
                values[index, : len(bias)] = list(bias.values())
            arrays["bias_ids"], arrays["bias_values"] = ids, values
        return arrays, failed

    def batch(self, kind: SamplingKind, inputs: dict[str, Tensor]) -> SamplingBatch:
        """The sampler's argument from arrays that are on the device by now."""
        return SamplingBatch(
            temperature=inputs["temperature"],
            top_k=inputs["top_k"],
            top_p=inputs["top_p"],
            min_p=inputs["min_p"],
            seeds=inputs["seeds"],
            positions=inputs["sample_positions"],
            vocab_size=self.vocab_size,
            all_greedy=kind.all_greedy,
            any_filter=kind.any_filter,
            any_top_k=kind.any_top_k,
            any_top_p=kind.any_top_p,
            presence=inputs["presence"] if kind.has_penalties else None,
            frequency=inputs["frequency"] if kind.has_penalties else None,
            repetition=inputs["repetition"] if kind.has_penalties else None,
            output_counts=self.output_counts if kind.has_penalties else None,
            rows=inputs["count_rows"] if kind.has_penalties else None,
            bias_ids=inputs["bias_ids"] if kind.has_bias else None,
            bias_values=inputs["bias_values"] if kind.has_bias else None,
            masks=inputs["masks"] if kind.has_mask else None,
            mask_rows=inputs["mask_rows"] if kind.has_mask else None,
            num_logprobs=kind.num_logprobs,
        )


def _uses_of(params: SamplingParams) -> int:
    draws = params.temperature > 0
    used = {
        Uses.DRAW: draws,
        Uses.TOP_K: draws and params.top_k > 0,
        Uses.TOP_P: draws and params.top_p < 1,
        Uses.MIN_P: draws and params.min_p > 0,
        Uses.PENALTIES: params.has_penalties,
        Uses.BIAS: bool(params.logit_bias) or params.min_tokens > 0,
        Uses.LOGPROBS: params.logprobs is not None,
    }
    return sum(flag for flag, is_used in used.items() if is_used)


def _is_masked(chunk: Chunk) -> bool:
    seq = chunk.seq
    return seq.constraint is not None and seq.constraint.is_masked(seq.output_ids)


def _bias_of(chunk: Chunk, eos_token_ids: frozenset[int]) -> dict[int, float]:
    """``logit_bias``, and -inf for what is banned; a mask has left that out already."""
    bias = dict(chunk.seq.params.logit_bias)
    if not _is_masked(chunk):
        bias.update(dict.fromkeys(_banned_ids(chunk, eos_token_ids), -math.inf))
    return bias


def _banned_ids(chunk: Chunk, eos_token_ids: frozenset[int]) -> list[int]:
    """What would end the sequence before ``min_tokens``."""
    params = chunk.seq.params
    if chunk.end - chunk.seq.num_prompt >= params.min_tokens:
        return []
    return [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
