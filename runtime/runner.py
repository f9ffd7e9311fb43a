"""From a `Plan` to tokens: packs the step's inputs, runs the model, samples, starts the read-back.

`launch` returns while the device works. What a step draws stays on the device as input of the next,
so the host may launch a step before it has seen the tokens of the one before.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.batch import PagedBatch
from kernels.sampling import Sampled, count_tokens, sample
from runtime.graphs import CudaQueue, DecodeGraphs, DeviceQueue, GraphKey, HostQueue, Inputs
from runtime.models import CausalLM
from runtime.prompt_scores import read_scores, score_tokens
from runtime.request import Sequence, TokenLogprobs
from runtime.sampler_rows import SamplerRows, SamplingKind
from runtime.scheduler import Chunk, Plan, SampledToken
from runtime.staging import Array, Staging
from runtime.tapes import DecodeTapes

DUMMY_PAGE = 0


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the host knows of a step; lengths are limits, the true ones are on the device."""

    num_decodes: int
    max_query_len: int
    max_context_len: int
    min_chunk_context_len: int
    num_sampled: int


class _StepStaging:
    """The host memory of one step, which must stay as it is until its tokens are read."""

    def __init__(self, device: torch.device) -> None:
        self.inputs = Staging(device)
        self.extra = Staging(device)


class LaunchedStep:
    """A step that the device has in its queue."""

    def __init__(
        self,
        chunks: list[Chunk],
        drawn: Sampled | None,
        wait: Callable[[], None],
        give_back: Callable[[], None],
        failed: list[Sequence],
        scored: list[tuple[Chunk, list[Sampled]]],
    ) -> None:
        self.failed = failed
        self._chunks = chunks
        self._drawn = drawn
        self._scored = scored
        self._wait = wait
        self._give_back = give_back

    def tokens(self) -> list[SampledToken]:
        """Wait for the step; one token per sampling chunk. Call it once.

        Chunks of which logprobs were asked have them then.
        """
        self._wait()
        self._give_back()
        for chunk, parts in self._scored:
            chunk.prompt_logprobs = read_scores(parts)
        return [] if self._drawn is None else _tokens(self._drawn, self._chunks)


class ModelRunner:
    """Owns the model, its pages and the sequences' rows. One `launch` is one step."""

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
        queue: DeviceQueue | None = None,
    ) -> None:
        """``num_tokens``: ids at and above it are padding rows of the head and are never drawn.

        ``queue`` is the device's own unless a test or a benchmark stands in for it.
        """
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
        self.queue = queue or (CudaQueue() if device.type == "cuda" else HostQueue())
        self.graphs: DecodeGraphs | None = None
        self._tapes = DecodeTapes(self.caches) if device.type == "cpu" else None
        # Rows of sequences, then one of padding. The device's copies are changed by steps only.
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._padding_row = max_num_seqs
        self._pages_per_seq = -(-max_model_len // page_size)
        table_shape = (max_num_seqs + 1, self._pages_per_seq)
        self._block_tables = np.full(table_shape, DUMMY_PAGE, np.int32)
        self._num_pages = [0] * (max_num_seqs + 1)  # entries of each row that the device has
        self._device_tables = torch.full(table_shape, DUMMY_PAGE, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._recorded_logits: Tensor | None = None  # one for all graphs: large batches need much
        self._idle_staging: list[_StepStaging] = []

    def record_steps(self) -> None:
        """From now on record each decode step that is new and replay those that are not."""
        self.graphs = DecodeGraphs(
            self.queue,
            self.device,
            self._max_num_seqs,
            self._max_model_len,
            self._recorded_step,
            self._padding,
        )

    @torch.inference_mode()
    def record_all(self) -> None:
        """Record every decode step that is usual, now instead of when it comes up."""
        assert self.graphs is not None, "record_steps comes first"
        for key in self.graphs.usual_keys():
            self.graphs.record(key)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> LaunchedStep:
        """Write K/V of exactly [start, end) of each chunk; draw a token where a chunk samples."""
        failed = self._start_rows(plan.started)
        staging = self._idle_staging.pop() if self._idle_staging else _StepStaging(self.device)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        rows = np.array([chunk.seq.row for chunk in sampling], np.int64)
        kind = self.sampler.kind_of(rows, sampling) if sampling else None
        key = self.graphs.key_of(plan, kind) if self.graphs else None
        arrays, shape = self._arrays(plan, sampling, key)
        fields = staging.inputs.pack(arrays)
        drawn: Sampled | None = None
        scored: list[tuple[Chunk, list[Sampled]]] = []
        if key is not None and self.graphs is not None:
            inputs, output = self.graphs.run(key, staging.inputs, fields)
            if key.kind is not None:
                drawn = Sampled(output)
        else:
            inputs = staging.inputs.upload(fields)
            hidden = self._hidden(inputs, shape)
            scored = self._score(plan, hidden)
            output = self._head(hidden, inputs, shape)
        if drawn is None and kind is not None:
            if not kind.is_plain:
                extra, unmasked = self.sampler.extra_arrays(
                    kind, arrays["sample_rows"], sampling, self.eos_token_ids
                )
                failed += [seq for seq in unmasked if seq not in failed]
                inputs = inputs | staging.extra.upload(staging.extra.pack(extra))
            drawn = self._sample(output, inputs, kind)
        read = None if drawn is None else self._start_reading(drawn)
        return LaunchedStep(
            sampling,
            read,
            self.queue.mark(),
            lambda: self._idle_staging.append(staging),
            failed,
            scored,
        )

    def _start_rows(self, started: list[Sequence]) -> list[Sequence]:
        """Fill the rows of sequences that begin; those whose parameters could not be taken over."""
        failed = []
        for seq in started:
            self._num_pages[seq.row] = 0
            try:
                self.sampler.start(seq)
            except Exception:
                traceback.print_exc()
                failed.append(seq)
        return failed

    # -- what runs on the device, recorded or not ------------------------------------------

    def _recorded_step(self, key: GraphKey, inputs: Inputs) -> Tensor:
        size = key.batch_size
        logits = self._logits(inputs, StepShape(size, 1, key.context_limit, 0, size))
        if key.kind is not None:
            return self._sample(logits, inputs, key.kind).token_ids
        if self._recorded_logits is None:
            self._recorded_logits = logits.new_empty((self._padding_row, logits.shape[1]))
        return self._recorded_logits[:size].copy_(logits)

    def _logits(self, inputs: Inputs, shape: StepShape) -> Tensor:
        """[num_sampled, vocab]; the hidden states of all tokens if none samples."""
        return self._head(self._hidden(inputs, shape), inputs, shape)

    def _hidden(self, inputs: Inputs, shape: StepShape) -> Tensor:
        """Hidden states of all tokens, [num_tokens, hidden_size]."""
        rows = inputs["rows"]
        self._device_tables.view(-1).index_copy_(0, inputs["table_entries"], inputs["table_pages"])
        decoded = inputs["token_ids"][: shape.num_decodes]
        drawn = self._last_tokens.index_select(0, rows[: shape.num_decodes])
        decoded.copy_(torch.where(decoded < 0, drawn, decoded))
        width = -(-shape.max_context_len // self.page_size)
        batch = PagedBatch(
            positions=inputs["positions"],
            slot_mapping=inputs["slots"],
            cu_seqlens_q=inputs["cu_seqlens_q"],
            context_lens=inputs["context_lens"],
            block_table=self._device_tables[:, :width].index_select(0, rows),
            num_decodes=shape.num_decodes,
            max_query_len=shape.max_query_len,
            max_context_len=shape.max_context_len,
            min_chunk_context_len=shape.min_chunk_context_len,
        )
        if self._tapes is None:
            return self.model.forward(inputs["token_ids"], batch, self.caches)
        return self._tapes.forward(self.model, inputs["token_ids"], batch)

    def _head(self, hidden: Tensor, inputs: Inputs, shape: StepShape) -> Tensor:
        if shape.num_sampled == 0:
            return hidden
        if shape.num_sampled < hidden.shape[0]:
            hidden = hidden.index_select(0, inputs["logit_rows"])
        return self.model.logits(hidden)

    def _score(self, plan: Plan, hidden: Tensor) -> list[tuple[Chunk, list[Sampled]]]:
        """Logprobs of the tokens of prompts that chunks ask for, on their way to the host."""
        scored = []
        end = 0  # rows of ``hidden``
        for chunk in plan.chunks:
            start, end = end, end + chunk.num_tokens
            num_top = chunk.seq.params.prompt_logprobs
            if not chunk.num_scored or num_top is None:
                continue
            # the row of a token tells of the one that follows it
            first = start + chunk.first_scored - 1 - chunk.start
            rows = hidden[first : first + chunk.num_scored]
            ids = chunk.seq.token_range(chunk.first_scored, chunk.first_scored + chunk.num_scored)
            parts = score_tokens(self.model.logits, rows, ids, self.sampler.vocab_size, num_top)
            scored.append((chunk, [self._start_reading(part) for part in parts]))
        return scored

    def _sample(self, logits: Tensor, inputs: Inputs, kind: SamplingKind) -> Sampled:
        """Draw, and leave the tokens where the next step finds them."""
        batch = self.sampler.batch(kind, inputs)
        sampled = sample(logits, batch)
        if batch.output_counts is not None and batch.rows is not None:
            count_tokens(batch.output_counts, batch.rows, sampled.token_ids)
        # what is no token is embedded as one until the host has seen it
        self._last_tokens.index_copy_(0, inputs["sample_rows"], sampled.token_ids.clamp(min=0))
        return sampled

    def _padding(self, key: GraphKey) -> dict[str, Array]:
        return self._arrays(Plan([], 0, []), [], key)[0]

    # -- the host's part -------------------------------------------------------------------

    def _arrays(
        self, plan: Plan, sampling: list[Chunk], key: GraphKey | None
    ) -> tuple[dict[str, Array], StepShape]:
        """A step's inputs, padded to the rows of a graph if there is a ``key``."""
        rows: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        token_ids: list[int] = []
        entries: list[int] = []  # of the device's table, flat, and the pages to write there
        pages: list[int] = []
        for chunk in plan.chunks:
            seq = chunk.seq
            row = seq.row
            rows.append(row)
            starts.append(chunk.start)
            ends.append(chunk.end)
            known = seq.token_range(chunk.start, chunk.end)
            # a chunk is known, or is one token that is still being drawn: the device has it
            token_ids += known or (-1,)
            num_known = self._num_pages[row]
            if num_known < len(seq.block_table):
                new = seq.block_table[num_known:]
                self._block_tables[row, num_known : num_known + len(new)] = new
                first = row * self._pages_per_seq + num_known
                entries += range(first, first + len(new))
                pages += new
                self._num_pages[row] = len(seq.block_table)
        if key is not None:
            num_padding = key.batch_size - len(rows)
            rows += [self._padding_row] * num_padding
            starts += [0] * num_padding
            ends += [1] * num_padding
            token_ids += [0] * num_padding
            num_entries = key.batch_size - len(entries)
            assert num_entries >= 0, "a decode takes one page at most"
            entries += [self._padding_row * self._pages_per_seq] * num_entries
            pages += [DUMMY_PAGE] * num_entries

        row_array = np.array(rows, np.int64)
        start_array, end_array = np.array(starts, np.int64), np.array(ends, np.int64)
        lens = end_array - start_array
        cu_seqlens = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lens, out=cu_seqlens[1:])
        if len(token_ids) == len(rows):
            owners, positions = row_array, start_array
        else:
            owners = np.repeat(row_array, lens)  # row of each token
            positions = np.arange(len(token_ids)) + np.repeat(start_array - cu_seqlens[:-1], lens)
        table_pages = self._block_tables[owners, positions // self.page_size].astype(np.int64)
        if len(sampling) == len(plan.chunks):  # padding samples too
            samplers: slice | Array = slice(None)
        else:
            samplers = np.array([i for i, chunk in enumerate(plan.chunks) if chunk.samples], int)
        arrays: dict[str, Array] = {
            "token_ids": np.array(token_ids, np.int64),
            "positions": positions,
            "slots": table_pages * self.page_size + positions % self.page_size,
            "rows": row_array,
            "cu_seqlens_q": cu_seqlens.astype(np.int32),
            "context_lens": end_array.astype(np.int32),
            "table_entries": np.array(entries, np.int64),
            "table_pages": np.array(pages, np.int32),
        }
        num_sampled = len(rows) if key is not None else len(sampling)
        if num_sampled:
            arrays["logit_rows"] = (cu_seqlens[1:] - 1)[samplers]
            arrays |= self.sampler.arrays(row_array[samplers], end_array[samplers])
        num_decodes = plan.num_decodes if key is None else key.batch_size
        return arrays, StepShape(
            num_decodes=num_decodes,
            max_query_len=int(lens.max()),
            max_context_len=int(end_array.max()),
            min_chunk_context_len=int(end_array[num_decodes:].min(initial=1 << 62))
            if num_decodes < len(rows)
            else 0,
            num_sampled=num_sampled,
        )

    @staticmethod
    def _start_reading(sampled: Sampled) -> Sampled:
        """A copy on the host, complete once the queue has come so far."""
        return Sampled(
            _copy_to_host(sampled.token_ids),
            None if sampled.logprobs is None else _copy_to_host(sampled.logprobs),
            None if sampled.top_ids is None else _copy_to_host(sampled.top_ids),
            None if sampled.top_logprobs is None else _copy_to_host(sampled.top_logprobs),
        )


def _copy_to_host(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def _tokens(drawn: Sampled, chunks: list[Chunk]) -> list[SampledToken]:
    """Rows of padding, which come last, are left out."""
    token_ids: list[int] = drawn.token_ids[: len(chunks)].tolist()
    if drawn.logprobs is None or drawn.top_ids is None or drawn.top_logprobs is None:
        return [SampledToken(token_id) for token_id in token_ids]
    logprobs: list[float] = drawn.logprobs.tolist()
    top_ids: list[list[int]] = drawn.top_ids.tolist()
    top_logprobs: list[list[float]] = drawn.top_logprobs.tolist()
    tokens = []
    for i, chunk in enumerate(chunks):
        num_top = chunk.seq.params.logprobs
        if num_top is None:
            tokens.append(SampledToken(token_ids[i]))
            continue
        top = tuple(zip(top_ids[i][:num_top], top_logprobs[i][:num_top], strict=True))
        tokens.append(SampledToken(token_ids[i], TokenLogprobs(logprobs[i], top)))
    return tokens
