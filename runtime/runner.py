"""From a `Plan` to tokens: builds the step's tensors, runs the model, samples.

Per-sequence state the GPU needs every step lives in arrays indexed by the sequence's ``row``, so a
step gathers it with a handful of numpy operations instead of Python per sequence.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.sampling import Sampled, SamplingBatch, count_tokens, sample
from runtime.models import CausalLM
from runtime.request import Sequence, TokenLogprobs
from runtime.scheduler import Plan, SampledToken

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class SamplerRows:
    """Sampling parameters of the running sequences, one row each, and their token counts."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.zeros(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.presence = np.zeros(max_num_seqs, np.float32)
        self.frequency = np.zeros(max_num_seqs, np.float32)
        self.repetition = np.ones(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self.penalized = np.zeros(max_num_seqs, np.bool_)
        self.output_counts: Tensor | None = None  # [max_num_seqs, vocab], made when first needed

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
        self.penalized[row] = params.has_penalties
        if params.has_penalties:
            if self.output_counts is None:
                shape = (len(self.seeds), self.vocab_size)
                self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            counts = np.bincount(seq.output_ids, minlength=self.vocab_size).astype(np.int32)
            self.output_counts[row] = torch.from_numpy(counts).to(self.device)

    def batch(self, seqs: list[Sequence], eos_token_ids: frozenset[int]) -> SamplingBatch:
        """The sampler's argument for these sequences, in this order."""
        rows = np.fromiter((seq.row for seq in seqs), np.int64, len(seqs))
        positions = np.fromiter((seq.num_tokens for seq in seqs), np.int64, len(seqs))
        penalized = bool(self.penalized[rows].any())
        bias_ids, bias_values = self._bias(seqs, eos_token_ids)
        temperature, top_k = self.temperature[rows], self.top_k[rows]
        top_p, min_p = self.top_p[rows], self.min_p[rows]
        drawing = temperature > 0
        any_filter = bool((drawing & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any())
        num_logprobs = max(
            (-1 if seq.params.logprobs is None else seq.params.logprobs for seq in seqs), default=-1
        )
        return SamplingBatch(
            temperature=to_device(self.device, temperature),
            top_k=to_device(self.device, top_k),
            top_p=to_device(self.device, top_p),
            min_p=to_device(self.device, min_p),
            seeds=to_device(self.device, self.seeds[rows]),
            positions=to_device(self.device, positions),
            vocab_size=self.vocab_size,
            all_greedy=not bool(drawing.any()),
            any_filter=any_filter,
            presence=to_device(self.device, self.presence[rows]) if penalized else None,
            frequency=to_device(self.device, self.frequency[rows]) if penalized else None,
            repetition=to_device(self.device, self.repetition[rows]) if penalized else None,
            output_counts=self.output_counts if penalized else None,
            rows=to_device(self.device, rows) if penalized else None,
            bias_ids=bias_ids,
            bias_values=bias_values,
            num_logprobs=num_logprobs,
        )

    def count(self, batch: SamplingBatch, token_ids: Tensor) -> None:
        """Note the drawn tokens for later penalties, on the device."""
        if batch.output_counts is not None and batch.rows is not None:
            count_tokens(batch.output_counts, batch.rows, token_ids)

    def _bias(
        self, seqs: list[Sequence], eos_token_ids: frozenset[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        entries: list[dict[int, float]] = []
        for seq in seqs:
            params = seq.params
            bias = dict(params.logit_bias)
            if len(seq.output_ids) < params.min_tokens:
                banned = (
                    params.stop_token_ids
                    if params.ignore_eos
                    else (
                        *params.stop_token_ids,
                        *eos_token_ids,
                    )
                )
                bias.update(dict.fromkeys(banned, -math.inf))
            entries.append(bias)
        width = max(map(len, entries), default=0)
        if width == 0:
            return None, None
        ids = np.full((len(seqs), width), -1, np.int64)
        values = np.zeros((len(seqs), width), np.float32)
        for row, bias in enumerate(entries):
            ids[row, : len(bias)] = list(bias)
            values[row, : len(bias)] = list(bias.values())
        return to_device(self.device, ids), to_device(self.device, values)


class ModelRunner:
    """Owns the model, its pages and the sampler's rows. One call of `run` is one step."""

    def __init__(
        self,
        model: CausalLM,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_model_len: int,
        num_tokens: int,
        eos_token_ids: frozenset[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``num_tokens``: ids at and above it are padding rows of the head and are never drawn."""
        self.model = model
        self.page_size = page_size
        self.device = device
        self.eos_token_ids = eos_token_ids
        self.caches: list[dict[str, Tensor]] = [
            {
                # One page more than the pool hands out: the dummy page.
                name: torch.zeros(num_pages + 1, page_size, *shape, dtype=dtype, device=device)
                for name, shape in layer.items()
            }
            for layer in model.cache_spec()
        ]
        self.sampler = SamplerRows(max_num_seqs, num_tokens, device)
        pages_per_seq = -(-max_model_len // page_size)
        self._block_table = np.zeros((max_num_seqs, pages_per_seq), np.int32)
        self._num_pages = np.zeros(max_num_seqs, np.int32)  # valid entries of each row

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[SampledToken]:
        """Write K/V of exactly [start, end) of each chunk; draw a token where a chunk samples."""
        for seq in plan.started:
            self._num_pages[seq.row] = 0
            self.sampler.start(seq)
        token_ids, batch = self._batch(plan)
        hidden = self.model.forward(token_ids, batch, self.caches)  # [num_tokens, hidden]
        samplers = [i for i, chunk in enumerate(plan.chunks) if chunk.samples]
        if not samplers:
            return []
        ends = np.cumsum([chunk.num_tokens for chunk in plan.chunks])[samplers] - 1
        if len(ends) < hidden.shape[0]:
            hidden = hidden[to_device(self.device, ends)]  # [num_sampled, hidden]
        logits = self.model.logits(hidden)  # [num_sampled, vocab]
        seqs = [plan.chunks[i].seq for i in samplers]
        sampling = self.sampler.batch(seqs, self.eos_token_ids)
        sampled = sample(logits, sampling)
        self.sampler.count(sampling, sampled.token_ids)
        return _to_host(sampled, seqs)

    def _batch(self, plan: Plan) -> tuple[Tensor, PagedBatch]:
        chunks = plan.chunks
        rows = np.fromiter((chunk.seq.row for chunk in chunks), np.int64, len(chunks))
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
        lens = np.fromiter((chunk.num_tokens for chunk in chunks), np.int64, len(chunks))
        ids: list[int] = []
        for chunk in chunks:
            ids += chunk.seq.token_range(chunk.start, chunk.end)
            self._copy_block_table(chunk.seq)
        cu_seqlens = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(lens, out=cu_seqlens[1:])
        owners = np.repeat(np.arange(len(chunks)), lens)  # chunk of each token
        positions = np.arange(len(ids)) + (starts - cu_seqlens[:-1])[owners]
        context_lens = (starts + lens).astype(np.int32)
        max_context_len = int(context_lens.max())
        table = self._block_table[rows, : -(-max_context_len // self.page_size)]
        pages = table[owners, positions // self.page_size]
        slots = pages.astype(np.int64) * self.page_size + positions % self.page_size
        batch = PagedBatch(
            positions=to_device(self.device, positions),
            slot_mapping=to_device(self.device, slots),
            cu_seqlens_q=to_device(self.device, cu_seqlens),
            context_lens=to_device(self.device, context_lens),
            block_table=to_device(self.device, table),
            num_decodes=plan.num_decodes,
            max_query_len=int(lens.max()),
            max_context_len=max_context_len,
            min_chunk_context_len=min(context_lens[plan.num_decodes :].tolist(), default=0),
        )
        return to_device(self.device, np.array(ids, np.int64)), batch

    def _copy_block_table(self, seq: Sequence) -> None:
        known = self._num_pages[seq.row]
        if known < len(seq.block_table):
            self._block_table[seq.row, known : len(seq.block_table)] = seq.block_table[known:]
            self._num_pages[seq.row] = len(seq.block_table)


def to_device(device: torch.device, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _to_host(sampled: Sampled, seqs: list[Sequence]) -> list[SampledToken]:
    token_ids: list[int] = sampled.token_ids.tolist()
    if sampled.logprobs is None or sampled.top_ids is None or sampled.top_logprobs is None:
        return [SampledToken(token_id) for token_id in token_ids]
    logprobs: list[float] = sampled.logprobs.tolist()
    top_ids: list[list[int]] = sampled.top_ids.tolist()
    top_logprobs: list[list[float]] = sampled.top_logprobs.tolist()
    tokens = []
    for i, seq in enumerate(seqs):
        num_top = seq.params.logprobs
        if num_top is None:
            tokens.append(SampledToken(token_ids[i]))
            continue
        top = tuple(zip(top_ids[i][:num_top], top_logprobs[i][:num_top], strict=True))
        tokens.append(SampledToken(token_ids[i], TokenLogprobs(logprobs[i], top)))
    return tokens
