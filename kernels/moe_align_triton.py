# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Sorting slots by expert on the GPU, in one launch; ``kernels.moe`` says what a slot is.

    key of slot s: expert(s) * num_slots + s           all different, so
    order[number of smaller keys] = s                  slots sorted by expert, stable
    expert_starts[e] = number of keys < e * num_slots  the first sorted position of expert e

A program counts the smaller keys for a block of slots or of experts. Counting takes num_slots^2
comparisons, but no program waits for another; many slots are sorted by torch instead.
Graph-safe: the grid follows from num_slots and num_experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import launch_config


@triton.jit(do_not_specialize=["num_slots"])
def align_kernel(
    slot_experts_ptr,  # [num_slots] int64
    order_ptr,  # [num_slots] int64, out
    expert_starts_ptr,  # [num_experts + 1] int64, out
    num_slots,
    num_experts,
    COUNTED: tl.constexpr,  # slots or experts, per program
    KEYS: tl.constexpr,  # compared at a time
):
    # the first programs count for slots, the others for experts
    num_slot_blocks = tl.cdiv(num_slots, COUNTED)
    is_for_slots = tl.program_id(0) < num_slot_blocks
    first = tl.program_id(0) - tl.where(is_for_slots, 0, num_slot_blocks)
    counted = first.to(tl.int64) * COUNTED + tl.arange(0, COUNTED)
    inside = counted < tl.where(is_for_slots, num_slots, num_experts + 1)
    experts = tl.load(slot_experts_ptr + counted, mask=inside & is_for_slots, other=0)
    keys = tl.where(is_for_slots, experts * num_slots + counted, counted * num_slots)
    smaller = tl.zeros((COUNTED,), dtype=tl.int32)
    for start in range(0, num_slots, KEYS):
        slots = start + tl.arange(0, KEYS)
        is_slot = slots < num_slots
        others = tl.load(slot_experts_ptr + slots, mask=is_slot, other=0) * num_slots + slots
        is_smaller = (others[None, :] < keys[:, None]) & is_slot[None, :]
        smaller += tl.sum(is_smaller.to(tl.int32), axis=1)
    tl.store(order_ptr + smaller, counted, mask=inside & is_for_slots)
    tl.store(expert_starts_ptr + counted, smaller.to(tl.int64), mask=inside & ~is_for_slots)


def align(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort slots by expert, those of one expert in their order.

    Args:
        expert_ids: [num_tokens, k] int64, each in [0, num_experts).

    Returns:
        order [num_slots] int64, the slot at each sorted position, and expert_starts
        [num_experts + 1] int64, the first sorted position of each expert, then num_slots.
    """
    slot_experts = expert_ids.contiguous().flatten()
    num_slots = slot_experts.shape[0]
    config = launch_config("moe_align", num_experts=num_experts)
    if num_slots > config.pop("max_slots"):
        return sort_slots(slot_experts, num_experts)
    order = torch.empty_like(slot_experts)
    expert_starts = slot_experts.new_empty(num_experts + 1)
    counted = config["COUNTED"]
    grid = (triton.cdiv(num_slots, counted) + triton.cdiv(num_experts + 1, counted),)
    align_kernel[grid](slot_experts, order, expert_starts, num_slots, num_experts, **config)
    return order, expert_starts


def sort_slots(slot_experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The same by torch's sort, in several launches."""
    sorted_experts, order = slot_experts.sort(stable=True)
    experts = torch.arange(num_experts + 1, device=slot_experts.device)
    return order, torch.searchsorted(sorted_experts, experts)
