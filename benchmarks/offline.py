"""The engine without a server: batches of prompts, timed, and what a decode step must read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.floors import Floor, model_floor
from kernels.packed_linear import QUANTIZED
from runtime import Engine, SamplingParams, find_checkpoint, inspect_checkpoint
from runtime.models.layers import Placement
from runtime.packing import linear_layers

FIRST_ID = 3  # ids below are control tokens in the embedded model's vocabulary


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One batch of prompts, all there at the start, answered to the last token."""

    num_prompt: int  # tokens of all prompts
    first_token_s: list[float]  # of each answer, since the start
    num_decoded: int  # tokens that came after every answer had its first
    decode_s: float  # seconds these took
    num_new: int  # tokens of all answers

    @property
    def prefill_s(self) -> float:
        """Until every answer had its first token."""
        return max(self.first_token_s)

    @property
    def prefill_tok_s(self) -> float:
        return self.num_prompt / self.prefill_s

    @property
    def decode_tok_s(self) -> float:
        return self.num_decoded / self.decode_s if self.num_decoded else 0.0


def random_prompts(batch: int, num_prompt: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids, the same for the same arguments on every machine."""
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = rng.integers(FIRST_ID, vocab_size, (batch, num_prompt)).tolist()
    return prompts


def run_batch(engine: Engine, prompts: list[list[int]], num_new: int) -> BatchTimes:
    """Answer the prompts together, greedily, ``num_new`` tokens each whatever they are."""
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    start = time.perf_counter()
    waiting = {engine.add(prompt, params) for prompt in prompts}
    first_token_s: list[float] = []
    num_before = 0
    while waiting:
        events = engine.step()
        num_before += len(events)
        new = waiting & {event.seq_id for event in events}
        first_token_s += [time.perf_counter() - start] * len(new)
        waiting -= new
    decoding = time.perf_counter()
    num_decoded = 0
    while engine.has_work:
        num_decoded += len(engine.step())
    return BatchTimes(
        num_prompt=sum(map(len, prompts)),
        first_token_s=first_token_s,
        num_decoded=num_decoded,
        decode_s=time.perf_counter() - decoding,
        num_new=num_before + num_decoded,
    )


def floor_of(engine: Engine) -> Floor:
    """What a step of the engine's model reads, as its weights lie in memory."""
    info = engine.info
    dtype = getattr(torch, info.dtype)
    if info.quantization in QUANTIZED:
        return checkpoint_floor(info.model, dtype, info.quantization)[0]
    floor, full = checkpoint_floor(info.model, dtype)
    # An engine in FP8 says how many bytes its weights take; the parts shrink alike, about.
    return floor.scaled(min(info.weight_bytes / full, 1.0))


def checkpoint_floor(
    model: str, dtype: torch.dtype, quantization: str | None = None
) -> tuple[Floor, int]:
    """A checkpoint's floor in ``dtype``, and the bytes of its weights before any is packed.

    With ``quantization``, int8 or int4, the floor is that of packed linear layers. Counted on the
    meta device, since an engine packs its weights as they are loaded.
    """
    checkpoint = inspect_checkpoint(find_checkpoint(model))
    packing = None if quantization is None else QUANTIZED[quantization]
    placement = Placement(torch.device("meta"), dtype, packing=packing)
    meta = checkpoint.family.build(checkpoint.config, placement, 1)
    num_bytes = sum(target.nbytes for target in meta.weight_targets().values())
    floor = model_floor(meta, dtype.itemsize)
    packed = [layer for layer in linear_layers(meta) if layer.packing is not None]
    if packed:  # the rest is small
        whole = sum(math.prod(layer.shape) * dtype.itemsize for layer in packed)
        floor = floor.scaled(sum(layer.packed_nbytes for layer in packed) / whole)
    return floor, num_bytes
