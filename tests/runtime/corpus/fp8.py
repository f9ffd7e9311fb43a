"""Damaged FP8 checkpoints: weights and scales that do not fit each other, and what is no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.runtime.checkpoints import FP8
from tests.runtime.corpus.case import (
    CONFIG,
    SERVED_FP8,
    WEIGHTS,
    Case,
    Edit,
    edit_tensors,
    of_config,
    set_config,
    set_tensor,
    with_value,
)

MATRIX = "model.layers.1.self_attn.o_proj.weight"  # [160, 30]: two blocks
EMBEDDINGS = "model.embed_tokens.weight"
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"  # kept decoded, so it is read in another way
EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"
SCALES, KV_B_SCALES, EXPERT_SCALES = (f"{name}_scale_inv" for name in (MATRIX, KV_B, EXPERT))


def _tensors(edit: Edit, *says: str, file: str = WEIGHTS) -> Case:
    return Case(edit_tensors(edit, SERVED_FP8), file, says)


def _tensor(name: str, make: Callable[[Tensor], Tensor], *says: str) -> Case:
    return Case(set_tensor(name, make, SERVED_FP8), WEIGHTS, (name, *says))


def _quantization(key: str, *says: str, **values: Any) -> Case:
    says = (f"quantization_config: {key}: ", *says)
    return Case(set_config(quantization_config=FP8 | values), CONFIG, says)


def _with_byte(byte: int) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed.view(torch.uint8)[-1, -1] = byte
        return changed

    return change


FP8_CASES: dict[str, Case] = of_config(
    SERVED_FP8,
    {
        "scales missing": _tensors(
            lambda tensors: tensors.pop(SCALES), SCALES, "tensors missing", file=""
        ),
        "scales without a matrix": _tensors(
            lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.ones(16, 2)}),
            "lm_head.weight_scale_inv",
            "does not have",
        ),
        "matrix missing, scales there": _tensors(
            lambda tensors: tensors.pop(MATRIX), MATRIX, "tensors missing", file=""
        ),
        "too few scales": _tensor(SCALES, lambda s: s[:1], "[1, 1]", "128 x 128", "make [2, 1]"),
        "too many scales": _tensor(SCALES, lambda s: s.repeat(1, 2), "[2, 2]", "make [2, 1]"),
        "a scale per row": _tensor(SCALES, lambda s: torch.ones(160, 1), "[160, 1]", "make [2, 1]"),
        "one scale for the tensor": _tensor(SCALES, lambda s: torch.ones(1), "[1]", "make [2, 1]"),
        "transposed scales": _tensor(SCALES, lambda s: s.T.contiguous(), "[1, 2]", "make [2, 1]"),
        "scales of another name": _tensors(
            lambda tensors: tensors.update({MATRIX + "_scale": tensors.pop(SCALES)}),
            SCALES,
            "tensors missing",
            file="",
        ),
        "scales of integers": _tensor(SCALES, lambda s: s.to(torch.int32), "dtype I32"),
        "scales in E8M0": _tensor(
            SCALES, lambda s: torch.ones(s.shape).to(torch.float8_e8m0fnu), "dtype F8_E8M0"
        ),
        "matrix in E4M3 FNUZ": _tensor(
            MATRIX, lambda w: w.float().to(torch.float8_e4m3fnuz), "dtype F8_E4M3FNUZ"
        ),
        "matrix in E5M2": _tensor(MATRIX, lambda w: w.float().to(torch.float8_e5m2), "F8_E5M2"),
        "matrix not quantized": _tensor(
            MATRIX, lambda w: w.bfloat16(), "dtype BF16 where an FP8 checkpoint has F8_E4M3"
        ),
        "matrix transposed": _tensor(MATRIX, lambda w: w.T.contiguous(), "[30, 160]", "[160, 30]"),
        "norm in FP8": _tensor(
            "model.norm.weight", lambda w: w.to(torch.float8_e4m3fn), "not a matrix"
        ),
        "NaN byte 7F": _tensor(MATRIX, _with_byte(0x7F), "holds NaN"),
        "NaN byte FF": _tensor(MATRIX, _with_byte(0xFF), "holds NaN"),
        "NaN byte in what is decoded": _tensor(KV_B, _with_byte(0x7F), "holds NaN"),
        "NaN byte in an expert": _tensor(EXPERT, _with_byte(0xFF), "holds NaN"),
        "scale NaN": _tensor(SCALES, with_value(float("nan")), "holds NaN"),
        "scale Inf": _tensor(SCALES, with_value(float("inf")), "holds an infinity"),
        "scale zero": _tensor(SCALES, with_value(0.0), "a scale that is not above 0"),
        "scale negative": _tensor(SCALES, with_value(-1e-3), "a scale that is not above 0"),
        "scale negative in an expert": _tensor(EXPERT_SCALES, with_value(-1e-3), "not above 0"),
        "scale NaN of what is decoded": _tensor(KV_B_SCALES, with_value(float("nan")), "NaN"),
        "scale zero of what is decoded": _tensor(KV_B_SCALES, with_value(0.0), "not above 0"),
        "scale so large that weights overflow": _tensor(
            SCALES, lambda s: s.fill_(3e38), "holds a scale above 7.6e+35: weights overflow"
        ),
        "scale of BF16 so large that weights overflow": _tensor(
            KV_B_SCALES, lambda s: s.fill_(3e38).bfloat16(), "weights overflow"
        ),
        "scale of BF16 NaN": _tensor(SCALES, with_value(float("nan"), torch.bfloat16), "NaN"),
        "what is decoded overflows float16": replace(
            _tensor(KV_B_SCALES, lambda s: s.fill_(1e4)),
            says=(f"{KV_B}: an FP8 value times its scale does not fit torch.float16",),
            dtype="float16",
        ),
        "embeddings in FP8 without scales": _tensors(
            lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].to(torch.float8_e4m3fn)}),
            f"{EMBEDDINGS}_scale_inv",
            "tensors missing",
            file="",
        ),
        "FP8 not declared": Case(
            set_config(quantization_config=None),
            WEIGHTS,
            ("dtype F8_E4M3", "config.json has no quantization_config"),
        ),
        "method unknown": _quantization("quant_method", '"awq"', "only fp8", quant_method="awq"),
        "method missing": _quantization("quant_method", "missing", quant_method=None),
        "blocks of 64": _quantization(
            "weight_block_size", "[64, 64] is not [128, 128]", weight_block_size=[64, 64]
        ),
        "blocks missing": _quantization("weight_block_size", "missing", weight_block_size=None),
        "format unknown": _quantization("fmt", '"e5m2"', fmt="e5m2"),
        "scales of activations static": _quantization(
            "activation_scheme", '"static"', activation_scheme="static"
        ),
        "scale format unknown": _quantization("scale_fmt", '"e3m4"', scale_fmt="e3m4"),
        "quantization not an object": Case(
            set_config(quantization_config="fp8"),
            CONFIG,
            ("quantization_config: ", "not an object"),
        ),
        "experts of 2^20 columns": Case(
            set_config(moe_intermediate_size=2**20),
            WEIGHTS,
            ("shared_experts.gate_proj.weight", "[272, 160]", "[2097152, 160]"),
        ),
        "sixty-four shared experts of 2^20 columns": Case(
            set_config(moe_intermediate_size=2**20, n_shared_experts=64),
            WEIGHTS,
            ("shared_experts.gate_proj.weight", "[272, 160]", "[67108864, 160]"),
        ),
    },
)
