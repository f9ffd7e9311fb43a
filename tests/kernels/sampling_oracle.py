"""An independent sampler: one row at a time, in numpy float64, with a full sort."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling import SamplingBatch

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """The parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    counts: dict[int, int] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None  # by a mask; None: all
    seed: int = 0
    position: int = 0

    @property
    def filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def probabilities(logits: Tensor, row: Row, vocab_size: int) -> FloatArray:
    """The exact distribution of one row, over ids below vocab_size."""
    values = logits[:vocab_size].double().numpy().copy()
    if row.allowed is not None:
        values[[i for i in range(vocab_size) if i not in row.allowed]] = -np.inf
    for token_id, bias in row.bias.items():
        values[token_id] += bias
    for token_id, count in row.counts.items():
        value = values[token_id]
        value = value / row.repetition if value > 0 else value * row.repetition
        values[token_id] = value - row.frequency * count - row.presence * (count > 0)
    weights = np.exp((values - values.max()) / row.temperature)
    if row.top_k > 0:
        kth = np.sort(values)[::-1][min(row.top_k, vocab_size) - 1]
        weights[values < kth] = 0
    if row.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        cumulative = np.cumsum(weights[order])
        last = int(np.argmax(cumulative >= np.float64(np.float32(row.top_p)) * cumulative[-1]))
        weights[values < values[order[last]]] = 0
    weights[weights < np.float64(np.float32(row.min_p)) * weights.max()] = 0
    return np.asarray(weights / weights.sum())


def draw(distribution: FloatArray, uniform: float) -> tuple[int, float]:
    """The first id whose cumulative probability exceeds ``uniform``, and how near the call was."""
    cumulative = np.cumsum(distribution)
    token_id = int(np.argmax(cumulative > uniform))
    return token_id, float(np.abs(cumulative - uniform).min())


def make_batch(
    rows: list[Row], vocab_size: int, *, num_logprobs: int = -1, device: str = "cpu"
) -> SamplingBatch:
    """The batch an engine would make of the rows, with penalties and bias if some row has them."""

    def floats(name: str) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=torch.float32)

    def ints(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    penalties: dict[str, Tensor] = {}
    if any(row.counts for row in rows):
        # sequences sit in reverse order in the count table, so a mixed-up row shows
        counts = torch.zeros((len(rows) + 1, vocab_size + 3), dtype=torch.int32)
        order = torch.arange(len(rows), 0, -1)
        for index, row in enumerate(rows):
            for token_id, count in row.counts.items():
                counts[len(rows) - index, token_id] = count
        penalties = {
            "output_counts": counts,
            "rows": order,
            **{name: floats(name) for name in ("presence", "frequency", "repetition")},
        }
    biases: dict[str, Tensor] = {}
    max_bias = max(len(row.bias) for row in rows)
    if max_bias:
        ids = torch.full((len(rows), max_bias), -1)
        values = torch.zeros((len(rows), max_bias))
        for index, row in enumerate(rows):
            ids[index, : len(row.bias)] = torch.tensor(list(row.bias), dtype=torch.int64)
            values[index, : len(row.bias)] = torch.tensor(list(row.bias.values()))
        biases = {"bias_ids": ids, "bias_values": values}
    masks: dict[str, Tensor] = {}
    masked = [index for index, row in enumerate(rows) if row.allowed is not None]
    if masked:
        # masks are in reverse order, so a mixed-up row shows
        words = np.zeros((len(masked), -(-vocab_size // 32)), np.uint32)
        mask_rows = torch.full((len(rows),), -1, dtype=torch.int32)
        for place, index in enumerate(reversed(masked)):
            mask_rows[index] = place
            for token_id in rows[index].allowed or ():
                words[place, token_id // 32] |= np.uint32(1 << token_id % 32)
        masks = {"masks": torch.from_numpy(words.view(np.int32)), "mask_rows": mask_rows}
    tensors = {
        "temperature": floats("temperature"),
        "top_k": ints("top_k", torch.int32),
        "top_p": floats("top_p"),
        "min_p": floats("min_p"),
        "seeds": ints("seed"),
        "positions": ints("position"),
        **penalties,
        **biases,
        **masks,
    }
    return SamplingBatch(
        **{name: tensor.to(device) for name, tensor in tensors.items()},
        vocab_size=vocab_size,
        all_greedy=all(row.temperature == 0 for row in rows),
        any_filter=any(row.filters for row in rows),
        num_logprobs=num_logprobs,
    )
