"""Matrix products compile for every chip without spilling, with no GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels import compile as compiler
from kernels.compile import KernelVariant
from kernels.configs import launch_config
from kernels.linear_gemv_triton import gemv_kernel
from kernels.linear_slices_triton import finish_kernel
from kernels.linear_triton import heads_linear_config, linear_config, tile_kernel
from tests.kernels.passes import INTERPRETED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True, slots=True)
class Product:
    """One weight of a model."""

    name: str
    out_features: int
    in_features: int
    weight: torch.dtype = BF16
    x: torch.dtype | None = None  # the weight's
    out: torch.dtype | None = None  # that of x
    bias: bool = False
    gated: bool = False

    @property
    def pointers(self) -> dict[str, torch.dtype | int | float | None]:
        x = self.x or self.weight
        return {
            **{"x_ptr": x, "weight_ptr": self.weight, "out_ptr": self.out or x},
            "bias_ptr": self.weight if self.bias else None,
        }


def product_variants(
    product: Product, capability: int, rows: tuple[int, ...] = (1, 2, 3, 4, 8, 32)
) -> list[KernelVariant]:
    """What few rows launch, and the batch-invariant tile for any number of them."""
    variants = []
    for num_rows in rows:
        body, config = linear_config(
            product.weight,
            num_rows,
            product.out_features,
            product.in_features,
            capability,
            False,
        )
        if body == "cublas":
            continue
        make = gemv_variant if body == "gemv" else tile_variants
        variants += make(f"{body}_{num_rows}_{product.name}", product, num_rows, config)
    _, config = linear_config(
        product.weight, 1, product.out_features, product.in_features, capability, True
    )
    variants += tile_variants(f"invariant_{product.name}", product, 5, config)
    return list({variant.name: variant for variant in variants}.values())


def gemv_variant(
    name: str, product: Product, num_rows: int, config: dict[str, int]
) -> list[KernelVariant]:
    arguments = {
        **product.pointers,
        **{"row_stride": product.in_features, "weight_stride": product.in_features},
        **{"out_features": product.out_features, "in_features": product.in_features},
    }
    launch = {"ROWS": num_rows, "GATED": product.gated, **config}
    variants = [KernelVariant(name, gemv_kernel, arguments, launch)]
    if config["SLICES"] > 1:
        variants[0] = KernelVariant(
            name, gemv_kernel, arguments | {"out_ptr": FP32, "bias_ptr": None}, launch
        )
        variants.append(finish_of(product, config["SLICES"]))
    return variants


def tile_variants(
    name: str, product: Product, num_rows: int, config: dict[str, int]
) -> list[KernelVariant]:
    width = product.out_features // (1 + product.gated)
    arguments = {
        **product.pointers,
        **{"num_rows": num_rows, "out_features": product.out_features},
        **{"in_features": product.in_features, "row_stride": product.in_features},
        **{"row_head_stride": 0, "weight_head_stride": 0, "weight_in_stride": 1},
        **{"weight_out_stride": product.in_features, "out_row_stride": width},
        "out_head_stride": 0,
    }
    launch = {"GATED": product.gated, **config}
    variants = [KernelVariant(name, tile_kernel, arguments, launch | {"SLICED": False})]
    if config["SLICES"] > 1:
        partial = arguments | {"out_ptr": FP32, "bias_ptr": None}
        variants += [
            KernelVariant(f"{name}_sliced", tile_kernel, partial, launch | {"SLICED": True}),
            finish_variant(
                product.name,
                config["SLICES"],
                product.out_features,
                product.pointers,
                product.gated,
            ),
        ]
    return variants


def finish_of(product: Product, slices: int) -> KernelVariant:
    return finish_variant(
        product.name, slices, product.out_features, product.pointers, product.gated
    )


def finish_variant(
    name: str, slices: int, out_features: int, pointers: Mapping[str, Any], gated: bool
) -> KernelVariant:
    """The launch that adds up slices; ``pointers`` are those of the product."""
    arguments = {
        **{"partial_ptr": FP32, "bias_ptr": pointers["bias_ptr"], "out_ptr": pointers["out_ptr"]},
        **{"num_rows": 3, "out_features": out_features},
    }
    launch = {"SLICES": slices, "GATED": gated, **launch_config("linear_finish")}
    return KernelVariant(f"finish_{slices}_{name}", finish_kernel, arguments, launch)


def heads_variants(
    name: str,
    num_heads: int,
    nope: int,
    v_head_dim: int,
    rank: int,
    dtype: torch.dtype,
    capability: int,
) -> list[KernelVariant]:
    """Absorbed queries, contiguous along out_features, and the values of attended latents."""
    variants = []
    width = nope + v_head_dim
    for part, out_features, in_features, strides in (
        ("absorb", rank, nope, (1, rank)),
        ("values", v_head_dim, rank, (rank, 1)),
    ):
        config = heads_linear_config(dtype, num_heads, out_features, in_features, capability)
        del config["max_rows"]
        arguments = {
            **{"x_ptr": dtype, "weight_ptr": dtype, "bias_ptr": None, "out_ptr": dtype},
            **{"num_rows": 3, "out_features": out_features, "in_features": in_features},
            **{"row_stride": num_heads * in_features, "row_head_stride": in_features},
            **{"weight_head_stride": width * rank, "weight_out_stride": strides[0]},
            **{"weight_in_stride": strides[1], "out_row_stride": num_heads * out_features},
            "out_head_stride": out_features,
        }
        launch = {"SLICES": 1, "SLICED": False, "GATED": False, **config}
        variants.append(KernelVariant(f"{part}_{name}", tile_kernel, arguments, launch))
    return variants


# the launches that take the most registers or shared memory, and one of each kind
TIGHT = [
    (Product("qwen_7b_gate_up", 37888, 3584, gated=True), (4, 8)),
    (Product("qwen_1_5b_o", 1536, 1536), (1, 32)),
    (Product("v3_router", 256, 7168, FP32, BF16, FP32), (4,)),
    (Product("tiny_gate_up_fp32", 768, 128, FP32, gated=True), (4, 8)),
]
ALL = [
    Product("qwen_1_5b_qkv", 2048, 1536, bias=True),
    Product("qwen_1_5b_o", 1536, 1536),
    Product("qwen_1_5b_gate_up", 17920, 1536, gated=True),
    Product("qwen_1_5b_down", 1536, 8960),
    Product("qwen_1_5b_logits", 151936, 1536, out=FP32),
    Product("qwen_7b_qkv", 4608, 3584, bias=True),
    Product("qwen_7b_o", 3584, 3584),
    Product("qwen_7b_gate_up", 37888, 3584, gated=True),
    Product("qwen_7b_down", 3584, 18944),
    Product("qwen_7b_logits", 152064, 3584, out=FP32),
    Product("llama_8b_qkv", 6144, 4096),
    Product("llama_8b_gate_up", 28672, 4096, gated=True),
    Product("llama_8b_gate_up_fp16", 28672, 4096, FP16, gated=True),
    Product("llama_8b_down", 4096, 14336),
    Product("llama_8b_logits", 128256, 4096, out=FP32),
    Product("v2_lite_qkv", 3648, 2048),
    Product("v2_lite_router", 64, 2048, FP32, BF16, FP32),
    Product("v2_lite_gate_up", 21888, 2048, gated=True),
    Product("v2_lite_down", 2048, 10944),
    Product("v2_lite_shared_down", 2048, 2816),
    Product("v2_lite_kv_b", 4096, 512),
    Product("v3_qkv", 2112, 7168),
    Product("v3_q_b", 24576, 1536),
    Product("v3_kv_b", 32768, 512),
    Product("v3_router", 256, 7168, FP32, BF16, FP32),
    Product("v3_o", 7168, 16384),
    Product("v3_shared_gate_up", 4096, 7168, gated=True),
    Product("v3_logits", 129280, 7168, out=FP32),
    Product("tiny_qkv_fp32", 160, 128, FP32),
    Product("tiny_q_b_fp32", 256, 64, FP32),
    Product("tiny_gate_up_fp32", 768, 128, FP32, gated=True),
    Product("tiny_logits_fp32", 2048, 128, FP32),
    Product("tiny_router", 8, 128, FP32, BF16, FP32),
    Product("llama_8b_gate_up_fp32", 28672, 4096, FP32, gated=True, bias=True),
    Product("odd", 203, 299, bias=True),
    Product("odd_gate_up", 202, 1299, gated=True, bias=True),
    Product("odd_fp32", 203, 1299, FP32, bias=True),
]


def tight(capability: int) -> list[KernelVariant]:
    variants = heads_variants("v3", 128, 128, 128, 512, BF16, capability)
    for product, rows in TIGHT:
        variants += product_variants(product, capability, rows)
    return variants


def every(capability: int) -> list[KernelVariant]:
    return [
        *heads_variants("v3", 128, 128, 128, 512, BF16, capability),
        *heads_variants("v2_lite", 16, 128, 128, 512, BF16, capability),
        *heads_variants("v2_lite_fp32", 16, 128, 128, 512, FP32, capability),
        *heads_variants("tiny_fp32", 4, 32, 32, 64, FP32, capability),
        *heads_variants("odd", 3, 5, 7, 9, BF16, capability),
        *(variant for product in ALL for variant in product_variants(product, capability)),
    ]


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
@pytest.mark.parametrize("product", [TIGHT[0][0], TIGHT[1][0], TIGHT[2][0]], ids=lambda p: p.name)
def test_few_rows_load_weights_16_bytes_at_a_time(product: Product) -> None:
    (variant,) = product_variants(product, 90, (1,))[:1]
    code = compiler._dump(compiler._compile(variant, 90), "--dump-sass")
    loads = re.findall(r"\bLDG(?:STS)?\.[A-Z0-9.]+", code)
    # of a bf16 x beside fp32 weights, four values are 8 bytes
    narrow = [load for load in loads if not load.endswith(".128")]
    assert loads and all(product.x is not None and load.endswith(".64") for load in narrow)
    assert len(narrow) < len(loads) / 2


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
def test_the_order_of_sums_is_the_same_for_one_to_four_rows() -> None:
    """Which thread holds which sum decides the order in which they are added up."""
    for product in (TIGHT[0][0], TIGHT[1][0]):
        layouts = []
        for variant in product_variants(product, 89, (1, 2, 3, 4)):
            if variant.kernel is gemv_kernel:
                code = compiler._compile(variant, 89).asm["ttgir"]
                named = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)", code, re.MULTILINE))
                summed = re.findall(r"\}\) : \(tensor<(\w+), (#\w+)>\) -> ", code)
                assert len(summed) == variant.config["ROWS"]
                layouts += [(shape, named[layout]) for shape, layout in summed]
        assert len(layouts) == 10 and len(set(layouts)) == 1, product.name
