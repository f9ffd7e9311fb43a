"""How likely the model finds the tokens of a prompt, a bounded piece of the logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from kernels.sampling import Sampled
from runtime.request import TokenLogprobs

MAX_LOGITS = 1 << 24
"""Logits that are there at once: 64 MiB of them in float32, and as much again for logprobs."""


def score_tokens(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    token_ids: Seq[int],
    vocab_size: int,
    num_top: int,
) -> Iterator[Sampled]:
    """Log probabilities of ``token_ids`` and of the ``num_top`` best, in pieces, on the device.

    Args:
        logits_of: the model's head, [num_rows, hidden_size] to [num_rows, >= vocab_size].
        hidden: [num_tokens, hidden_size], at the token before each of ``token_ids``.
        vocab_size: ids at and above it are padding of the head.
    """
    ids = torch.tensor(token_ids, dtype=torch.int64)
    if hidden.is_cuda:
        ids = ids.pin_memory().to(hidden.device, non_blocking=True)
    num_rows = max(MAX_LOGITS // vocab_size, 1)
    for start in range(0, len(ids), num_rows):
        chosen = ids[start : start + num_rows]
        logits = logits_of(hidden[start : start + num_rows])[:, :vocab_size].float()
        logprobs = logits.log_softmax(dim=1)
        top = logprobs.topk(min(num_top, vocab_size), dim=1)
        own = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)
        yield Sampled(chosen, own, top.indices, top.values)


def read_scores(parts: Seq[Sampled]) -> list[TokenLogprobs]:
    """Pieces that are on the host by now, token by token."""
    scores = []
    for part in parts:
        assert part.logprobs is not None
        assert part.top_ids is not None and part.top_logprobs is not None
        columns = (part.logprobs, part.top_ids, part.top_logprobs)
        for own, ids, values in zip(*(column.tolist() for column in columns), strict=True):
            scores.append(TokenLogprobs(own, tuple(zip(ids, values, strict=True))))
    return scores
