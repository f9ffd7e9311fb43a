"""From logits to token ids: bias, penalties, filters, one draw per row, and log-probabilities.

    logits [num_rows, vocab], any float dtype; columns >= vocab_size are padding and never drawn

    l  = float32(logits), -inf where a mask does not allow the token
    l += bias                                                     -inf bans a token
    l  = l / r if l > 0 else l * r      where the token was generated (repetition penalty r)
    l -= frequency * count + presence * (count > 0)               counts of generated tokens
    temperature 0: the largest l, lowest id first
    else: w = exp((l - max l) / temperature), filtered, then the first id in id order with
          w[0] + ... + w[id] > u * sum(w),  u = Philox(seed, position) in [0, 1)
    id = -1 where float32(logits) of the row holds a NaN or an infinity

Every filter is a threshold on l, in this order: top-k keeps l >= the k-th largest; top-p keeps the
smallest such set that holds the share p of what top-k left; min-p keeps w >= min_p * max w. Tokens
tied with the last one kept are kept, so nothing depends on how a sort breaks ties. What is unusual:
a large vocabulary is not sorted on the common path, and a row has the same bits in any batch.
Graph-safe: every value of a row is read on the device; ``all_greedy``, the ``any_*`` flags and
``num_logprobs`` are host-known and pick the launches. A flag that is set for no row changes no bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import sampling_logprobs_triton, sampling_triton
from kernels.dispatch import use_triton
from kernels.philox import uniforms

_BLOCK = 128  # a row's mass is summed per block of ids, then over the blocks
_NUM_CANDIDATES = 256  # the filters look at this many of the largest logits before they sort a row
_QUICK_SORT = 4096  # up to here numpy sorts a row, and torch.topk finds so many, fastest


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to sample each row of a step's logits. All tensors are on the logits' device."""

    temperature: Tensor  # [num_rows] fp32, >= 0; 0 is greedy
    top_k: Tensor  # [num_rows] int32; 0 is off
    top_p: Tensor  # [num_rows] fp32 in [0, 1]; 1 is off
    min_p: Tensor  # [num_rows] fp32 in [0, 1]; 0 is off
    seeds: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64, the position the drawn token will take
    vocab_size: int  # ids at and above it are padding of the head
    all_greedy: bool  # every temperature is 0
    any_filter: bool  # some row uses top_k, top_p or min_p; else all three are ignored
    presence: Tensor | None = None  # [num_rows] fp32; the three penalties come together
    frequency: Tensor | None = None  # [num_rows] fp32
    repetition: Tensor | None = None  # [num_rows] fp32, > 0; 1 is off
    output_counts: Tensor | None = None  # [num_count_rows, >= vocab_size] int32, generated tokens
    rows: Tensor | None = None  # [num_rows] int64, rows of output_counts; below 0: a padding row
    bias_ids: Tensor | None = None  # [num_rows, max_bias] int64, an id once per row; -1 is unused
    bias_values: Tensor | None = None  # [num_rows, max_bias] fp32, -inf bans
    masks: Tensor | None = None  # [num_masks, ceil(vocab_size / 32)] int32; bit id % 32 allows id
    mask_rows: Tensor | None = None  # [num_rows] int32, rows of masks; below 0: all is allowed
    any_top_k: bool = True  # with any_filter: some row may use top_k; False saves 5 launches
    any_top_p: bool = True  # with any_filter: some row may use top_p; False saves 5 launches
    num_logprobs: int = -1  # -1: no log-probabilities; else how many of the largest to report


@dataclass(slots=True)
class Sampled:
    """What a step drew. Log-probabilities are of the raw logits, before bias and penalties.

    A row whose raw logits are not all finite drew -1, and its log-probabilities mean nothing.
    """

    token_ids: Tensor  # [num_rows] int64; -1: a raw logit of the row is NaN or infinite
    logprobs: Tensor | None = None  # [num_rows] fp32, of the drawn token
    top_ids: Tensor | None = None  # [num_rows, num_logprobs] int64, largest first, then lowest id
    top_logprobs: Tensor | None = None  # [num_rows, num_logprobs] fp32


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """Draw one token per row.

    Args:
        logits: [num_rows, vocab] with vocab >= ``batch.vocab_size``, any float dtype; not modified.
        batch: the rows' parameters.

    Returns:
        The drawn ids, and log-probabilities if ``batch.num_logprobs >= 0``. A row that holds a NaN
        or an infinity below vocab_size, before bias and penalties, draws -1 and changes no bit of
        the other rows. Clamp -1 before it indexes anything. A mask or bans that leave nothing make
        a row draw some id or other.
    """
    num_rows = logits.shape[0]
    if num_rows == 0:
        return _empty(logits, batch)
    if use_triton(logits):
        return Sampled(*sampling_triton.sample(logits, batch))
    raw = logits[:, : batch.vocab_size].float()  # [num_rows, vocab_size]
    not_finite = _rows_not_finite(raw)
    if not_finite is not None:  # nothing is drawn from these
        batch = replace(batch, temperature=batch.temperature.index_fill(0, not_finite, 0.0))
    token_ids = _choose(_adjust(raw, batch), batch)
    if not_finite is not None:
        token_ids.index_fill_(0, not_finite, -1)
    if batch.num_logprobs < 0:
        return Sampled(token_ids)
    return _with_logprobs(raw, token_ids, batch.num_logprobs)


def count_tokens(output_counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Add 1 to ``output_counts[rows, token_ids]`` in place, on the device.

    Args:
        output_counts: [num_count_rows, vocab] int32.
        rows: [num_tokens] int64; a (row, token id) pair appears once. A row below 0 counts nothing.
        token_ids: [num_tokens] int64. An id below 0 counts nothing.
    """
    if token_ids.shape[0] == 0:
        return
    if use_triton(output_counts):
        sampling_logprobs_triton.count_tokens(output_counts, rows, token_ids)
        return
    is_counted = (rows >= 0) & (token_ids >= 0)
    output_counts[rows[is_counted], token_ids[is_counted]] += 1


def _empty(logits: Tensor, batch: SamplingBatch) -> Sampled:
    ids = torch.empty(0, dtype=torch.int64, device=logits.device)
    if batch.num_logprobs < 0:
        return Sampled(ids)
    values = torch.empty(0, dtype=torch.float32, device=logits.device)
    shape = (0, batch.num_logprobs)
    return Sampled(ids, values, ids.view(shape), values.view(shape))


def _rows_not_finite(raw: Tensor) -> Tensor | None:
    """Indices of the rows that hold a NaN or an infinity, [num_not_finite] int64; None: no row."""
    # a finite sum has finite parts; finite parts can overflow it, so the rest is looked at closely
    if math.isfinite(raw.sum().item()):
        return None
    suspects = raw.sum(dim=1).isfinite().logical_not().nonzero().squeeze(1)
    not_finite = suspects[raw[suspects].isfinite().all(dim=1).logical_not()]
    return not_finite if not_finite.shape[0] > 0 else None


def _choose(adjusted: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the largest of each greedy row, and one draw of each other: [num_rows] int64."""
    drawn_rows = None if batch.all_greedy else batch.temperature.nonzero().squeeze(1)
    if drawn_rows is not None and drawn_rows.shape[0] == adjusted.shape[0]:
        return _draw(adjusted, batch, drawn_rows)
    # numpy's argmax is ten times as fast as torch's here; both return the lowest id among equals
    token_ids = torch.from_numpy(adjusted.numpy().argmax(axis=1))
    if drawn_rows is not None and drawn_rows.shape[0] > 0:
        token_ids[drawn_rows] = _draw(adjusted[drawn_rows], batch, drawn_rows)
    return token_ids


def _adjust(raw: Tensor, batch: SamplingBatch) -> Tensor:
    """Return ``raw`` [num_rows, vocab_size] with mask, bias and penalties, or itself."""
    logits = raw if batch.masks is None else _mask(raw, batch)
    if batch.bias_ids is not None and batch.bias_values is not None:
        used = (batch.bias_ids >= 0) & (batch.bias_ids < batch.vocab_size)
        values = batch.bias_values.masked_fill(~used, 0.0)
        logits = logits.scatter_add(1, batch.bias_ids.masked_fill(~used, 0), values)
    if batch.output_counts is None or batch.rows is None:
        return logits
    counts = batch.output_counts[batch.rows, : batch.vocab_size]  # [num_rows, vocab_size]
    seen = counts > 0
    if batch.repetition is not None:
        repetition = batch.repetition.unsqueeze(1)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, repeated, logits)
    if batch.frequency is not None:
        logits = logits - batch.frequency.unsqueeze(1) * counts
    if batch.presence is not None:
        logits = logits - batch.presence.unsqueeze(1) * seen
    return logits


def _mask(raw: Tensor, batch: SamplingBatch) -> Tensor:
    """Return a copy of ``raw`` [num_rows, vocab_size] with -inf for what masks do not allow."""
    assert batch.masks is not None and batch.mask_rows is not None
    rows = (batch.mask_rows >= 0).nonzero().squeeze(1)
    words = batch.masks[batch.mask_rows[rows].long()]
    bits = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32) & 1
    allowed = bits.flatten(1)[:, : batch.vocab_size].bool()  # [num_masked_rows, vocab_size]
    return raw.index_copy(0, rows, raw[rows].masked_fill(~allowed, float("-inf")))


def _draw(logits: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """Draw from rows of adjusted logits [len(rows), vocab_size], all with a temperature above 0."""
    temperature = batch.temperature[rows].unsqueeze(1)
    weights = logits - logits.amax(dim=1, keepdim=True)
    weights = weights.div_(temperature).exp_()
    if batch.any_filter:
        weights = _filter(logits, weights, temperature, batch, rows)
    blocks = _blocks(weights)
    mass = _mass_after_block(blocks)
    uniform = torch.from_numpy(uniforms(batch.seeds[rows], batch.positions[rows])).unsqueeze(1)
    target = uniform * mass[:, -1:]
    block_ids = _first_above(mass, target)  # [len(rows), 1]
    mass_before = functional.pad(mass, (1, 0)).gather(1, block_ids)
    block = blocks[torch.arange(rows.shape[0]), block_ids.squeeze(1)]  # [len(rows), _BLOCK]
    offsets = _first_above(block.cumsum(1, dtype=torch.float64), target - mass_before)
    return (block_ids * _BLOCK + offsets).squeeze(1).clamp(max=logits.shape[1] - 1)


def _blocks(weights: Tensor) -> Tensor:
    """View rows as [num_rows, num_blocks, _BLOCK], padded with weights of 0."""
    num_padding = -weights.shape[1] % _BLOCK
    padded = functional.pad(weights, (0, num_padding)) if num_padding else weights
    return padded.view(weights.shape[0], -1, _BLOCK)


def _mass_after_block(blocks: Tensor) -> Tensor:
    """Cumulative mass at the end of each block: [num_rows, num_blocks] fp64."""
    return blocks.sum(dim=2).double().cumsum(dim=1)


def _first_above(mass: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds the target, or the last one that adds mass."""
    above = torch.searchsorted(mass, target, right=True)
    last = torch.searchsorted(mass, mass[:, -1:].contiguous())
    return torch.minimum(above, last).clamp_(max=mass.shape[1] - 1)


def _filter(
    logits: Tensor, weights: Tensor, temperature: Tensor, batch: SamplingBatch, rows: Tensor
) -> Tensor:
    """Return ``weights`` with 0 for every token that top-k, top-p or min-p removes."""
    kept = weights >= batch.min_p[rows].unsqueeze(1)
    top_k, top_p = batch.top_k[rows], batch.top_p[rows]
    limited = ((top_k > 0) | (top_p < 1)).nonzero().squeeze(1)
    if limited.shape[0] == rows.shape[0]:
        kept &= logits >= _cut(logits, weights, temperature, top_k, top_p)
    elif limited.shape[0] > 0:
        cuts = logits.new_full((rows.shape[0], 1), float("-inf"))
        cuts[limited] = _cut(
            logits[limited], weights[limited], temperature[limited], top_k[limited], top_p[limited]
        )
        kept &= logits >= cuts
    return torch.where(kept, weights, 0.0)


def _cut(
    logits: Tensor,
    weights: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    num_candidates: int = _NUM_CANDIDATES,
) -> Tensor:
    """Return the lowest logit that top-k and top-p keep, per row: [num_rows, 1].

    Looks at the largest logits only, and at ever more of them for the rows whose cut lies further
    down. Sums over the candidates run in descending order, so how many there are does not
    change a row's bits.
    """
    largest = _largest(logits, max(num_candidates, 2 * int(top_k.max())))
    num_candidates = largest.shape[1]
    scaled = (largest - largest[:, :1]).div_(temperature)
    mass = scaled.exp_().cumsum(1, dtype=torch.float64)  # [num_rows, num_candidates]
    last_by_k = (top_k.long() - 1).clamp(min=0, max=num_candidates - 1).unsqueeze(1)
    cut_by_k = largest.gather(1, last_by_k)
    # with ties, unless they are banned: those weigh nothing however many there are
    is_by_k = (largest >= cut_by_k) & (largest > float("-inf"))
    num_by_k = is_by_k.sum(dim=1, keepdim=True).clamp(min=1)
    by_k, by_p = (top_k > 0).unsqueeze(1), (top_p < 1).unsqueeze(1)
    total = torch.where(
        by_k, mass.gather(1, num_by_k - 1), _mass_after_block(_blocks(weights))[:, -1:]
    )
    last_by_p = torch.searchsorted(mass, top_p.double().unsqueeze(1) * total)
    incomplete = torch.where(by_k, num_by_k, last_by_p) >= num_candidates
    last_by_p = torch.minimum(last_by_p, torch.where(by_k, num_by_k, num_candidates) - 1)
    cut = torch.where(by_p, largest.gather(1, last_by_p), cut_by_k)
    if num_candidates < logits.shape[1] and incomplete.any():
        again = incomplete.squeeze(1)
        cut[again] = _cut(
            logits[again],
            weights[again],
            temperature[again],
            top_k[again],
            top_p[again],
            16 * num_candidates,
        )
    return cut


def _largest(logits: Tensor, count: int) -> Tensor:
    """The ``count`` largest logits of each row, descending; fewer if the row is shorter."""
    vocab_size = logits.shape[1]
    count = min(count, vocab_size)
    if count <= _QUICK_SORT < vocab_size:
        return logits.topk(count, dim=1).values
    ascending = np.sort(logits.numpy(), axis=1)
    return torch.from_numpy(ascending[:, : -count - 1 : -1].copy())


def _with_logprobs(raw: Tensor, token_ids: Tensor, num_logprobs: int) -> Sampled:
    all_logprobs = raw.log_softmax(dim=1)
    logprobs = all_logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    num_top = min(num_logprobs, raw.shape[1])
    top_ids = torch.zeros((raw.shape[0], num_logprobs), dtype=torch.int64)
    top_logprobs = torch.full((raw.shape[0], num_logprobs), float("-inf"))
    if num_top > 0:
        cuts = raw.topk(num_top, dim=1).values[:, -1]
        for row, cut in enumerate(cuts):
            ids = (raw[row] >= cut).nonzero().squeeze(1)  # id order, so a stable sort ranks ties
            ranked = raw[row, ids].sort(descending=True, stable=True).indices[:num_top]
            top_ids[row, : ranked.shape[0]] = ids[ranked]
        top_logprobs[:, :num_top] = all_logprobs.gather(1, top_ids[:, :num_top])
    return Sampled(token_ids, logprobs, top_ids, top_logprobs)
