"""Products with weights: float64 on ragged shapes, and rows whose bits ignore their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.attention import pad_rows
from kernels.linear import heads_linear, linear, linear_silu_and_mul
from kernels.moe import moe_experts
from kernels.quant import fp8_linear
from tests.kernels.fp8_oracle import make_weight
from tests.kernels.passes import (
    DEVICES,
    DTYPES,
    HALF,
    INTERPRETED,
    assert_matches,
    assert_test_has_power,
)

# tokens, in_features, out_features; on a GPU by default: gemv, gemv, tile, cuBLAS
SHAPES = [(1, 13, 7), (3, 192, 96), (7, 33, 129), (64, 100, 31)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle_gated(x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
    product = x.double() @ gate_up.double().T + (0.0 if bias is None else bias.double())
    gate, up = product.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    in_features: int,
    out_features: int,
    with_bias: bool,
) -> None:
    x = draw(num_tokens, in_features).to(dtype)
    weight = draw(out_features, in_features, seed=1).to(dtype)
    bias = draw(out_features, seed=2).to(dtype)
    oracle = x.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    actual = linear(x.to(device), weight.to(device), bias.to(device) if with_bias else None)
    assert actual.dtype == dtype
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_silu_and_mul(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    in_features: int,
    out_features: int,
    with_bias: bool,
) -> None:
    x = draw(num_tokens, in_features).to(dtype)
    gate_up = (draw(2 * out_features, in_features, seed=1) * in_features**-0.5).to(dtype)
    bias = draw(2 * out_features, seed=2).to(dtype) if with_bias else None
    actual = linear_silu_and_mul(
        x.to(device), gate_up.to(device), None if bias is None else bias.to(device)
    )
    assert actual.dtype == dtype
    oracle = oracle_gated(x, gate_up, bias)
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features_first", [False, True])
@pytest.mark.parametrize(("num_tokens", "in_features", "out_features"), SHAPES)
def test_heads_linear(
    device: str,
    dtype: torch.dtype,
    in_features_first: bool,
    num_tokens: int,
    in_features: int,
    out_features: int,
) -> None:
    """Queries are part of wider rows, and both ways to lay out a weight occur."""
    num_heads = 3
    x = draw(num_tokens, num_heads, in_features + 5).to(dtype)[..., 2:-3]
    weight = draw(num_heads, out_features, in_features, seed=1).to(dtype)
    if in_features_first:
        weight = weight.mT.contiguous().mT
    actual = heads_linear(x.to(device), weight.to(device))
    assert actual.dtype == dtype and actual.is_contiguous()
    oracle = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 9, 40])
def test_logits_keep_the_fp32_sum_on_a_gpu(
    device: str, with_bias: bool, batch_invariant: bool, num_tokens: int
) -> None:
    x, weight, bias = (draw(*shape).to(HALF) for shape in ((num_tokens, 96), (70, 96), (70,)))
    given = bias if with_bias else None
    actual = linear(
        x.to(device),
        weight.to(device),
        None if given is None else given.to(device),
        out_dtype=torch.float32,
        batch_invariant=batch_invariant,
    )
    assert actual.dtype == torch.float32
    if device == "cpu" and not INTERPRETED:
        assert torch.equal(actual, linear(x, weight, given).float())
    else:
        assert_matches(actual, x.double() @ weight.double().T + (bias.double() if with_bias else 0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 9, 40])
def test_an_fp32_weight_multiplies_in_fp32(
    device: str, batch_invariant: bool, num_tokens: int
) -> None:
    x, weight = draw(num_tokens, 96).to(HALF), draw(70, 96, seed=1)
    oracle = x.double() @ weight.double().T
    for out_dtype in (None, torch.float32):
        actual = linear(
            x.to(device), weight.to(device), out_dtype=out_dtype, batch_invariant=batch_invariant
        )
        assert actual.dtype == torch.float32
        assert_matches(actual, oracle)
        assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_that_do_not_go_together_are_refused(device: str) -> None:
    x, weight = torch.ones(2, 8, device=device), torch.ones(4, 8, device=device)
    with pytest.raises(ValueError, match=r"weight is torch\.float16, x is torch\.float32"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"out_dtype is torch\.float16, weight is torch\.float32"):
        linear(x.half(), weight, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"gate_up is torch\.float32, x is torch\.float16"):
        linear_silu_and_mul(x.half(), weight)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_rows(device: str) -> None:
    x, weight = torch.empty(0, 8, device=device, dtype=HALF), torch.ones(4, 8, device=device)
    assert linear(x, weight.to(HALF)).shape == (0, 4)
    assert linear(x, weight.to(HALF)).dtype == HALF
    assert linear(x, weight.to(HALF), out_dtype=torch.float32).dtype == torch.float32
    assert linear(x, weight).dtype == torch.float32
    assert linear_silu_and_mul(x, weight.to(HALF)).shape == (0, 2)
    heads = torch.empty(0, 3, 8, device=device)
    assert heads_linear(heads, torch.ones(3, 5, 8, device=device)).shape == (0, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(192, 576), (37, 151), (2048, 2048)])
def test_a_row_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    x = draw(37, in_features, seed=1).to(dtype)
    weight = draw(out_features, in_features, seed=2).to(dtype)
    bias = draw(out_features, seed=3).to(dtype)
    if dtype == torch.bfloat16:
        x = x[:32]
    whole = linear(x, weight, bias)
    for num_tokens in (1, 2, 3, 4, 5, 6, 7, 9, 11, 16, 25):
        assert torch.equal(linear(x[:num_tokens], weight, bias), whole[:num_tokens])
    assert torch.equal(linear(x[-1:], weight, bias), whole[-1:])


MOST_ROWS = 200
Op = Callable[[Tensor], Tensor]


def invariant_ops(dtype: torch.dtype) -> dict[str, Op]:
    """Every product of a model with its batch-invariant mode on, as a function of its rows.

    1024 input features, since oneDNN sums few of them in one order for any number of rows; and
    matrices of a few numbers, which torch multiplies without oneDNN.
    """
    weight, narrow = (draw(*shape, seed=1).to(dtype) for shape in ((96, 1024), (8, 64)))
    heads = draw(2, 128, 512, seed=1).to(dtype)
    other_heads = heads.mT.contiguous().mT
    gate_up, down = draw(4, 96, 1024, seed=1).to(dtype), draw(4, 1024, 48, seed=2).to(dtype)
    few_chosen, many_chosen = (draw(MOST_ROWS, 4, seed=3), draw(MOST_ROWS, 4, seed=4))
    few_chosen[:, 2:] = float("-inf")
    fp8 = {name: make_weight([96], 1024, name)[0] for name in (None, "float32")}

    def experts(x: Tensor, preferences: Tensor, top_k: int) -> Tensor:
        weights, ids = preferences[: len(x)].topk(top_k)
        return moe_experts(x, ids, weights, gate_up, down, batch_invariant=True)

    return {
        "linear": lambda x: linear(x, weight, batch_invariant=True),
        "linear-bias": lambda x: linear(x, weight, weight[:, 0], batch_invariant=True),
        "linear-narrow": lambda x: linear(x[:, :64], narrow, batch_invariant=True),
        "linear-fp32-weight": lambda x: linear(x, weight.float(), batch_invariant=True),
        "logits": lambda x: linear(x, weight, out_dtype=torch.float32, batch_invariant=True),
        "linear_silu_and_mul": lambda x: linear_silu_and_mul(x, weight, batch_invariant=True),
        "heads_linear": lambda x: heads_linear(x.view(-1, 2, 512), heads, batch_invariant=True),
        "heads_linear-in-first": lambda x: heads_linear(
            x.view(-1, 2, 512), other_heads, batch_invariant=True
        ),
        "experts-of-many": lambda x: experts(x, many_chosen, 2),
        "experts-of-few": lambda x: experts(x, few_chosen, 1),
        "fp8_linear": lambda x: fp8_linear(x, fp8[None], batch_invariant=True),
        "fp8_linear-w8a8": lambda x: fp8_linear(x, fp8["float32"], batch_invariant=True),
    }


@pytest.mark.skipif(INTERPRETED, reason="the torch bodies are meant")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", invariant_ops(torch.bfloat16))
def test_a_batch_invariant_row_has_the_same_bits_in_steps_of_1_to_200_rows(
    name: str, dtype: torch.dtype
) -> None:
    """The last rows too: there a row stands at every place of a block."""
    op = invariant_ops(dtype)[name]
    x = (draw(MOST_ROWS, 1024) * 1024**-0.5).to(dtype)
    whole = op(x)
    for num_rows in range(1, MOST_ROWS):
        assert torch.equal(op(x[:num_rows]), whole[:num_rows]), num_rows
    if not name.startswith("experts"):  # which go by the row's number
        for num_rows in range(1, MOST_ROWS, 7):
            assert torch.equal(op(x[-num_rows:]), whole[-num_rows:]), num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_bodies_are_their_parts(dtype: torch.dtype) -> None:
    x, gate_up = draw(5, 48).to(dtype), draw(64, 48, seed=1).to(dtype)
    bias = draw(64, seed=2).to(dtype)
    expected = silu_and_mul(linear(x, gate_up, bias))
    assert torch.equal(linear_silu_and_mul(x, gate_up, bias), expected)
    heads, weight = draw(5, 4, 48).to(dtype), draw(4, 33, 48, seed=3).to(dtype)
    by_head = pad_rows(heads.transpose(0, 1), 33 * 48)
    expected = torch.bmm(by_head, weight.mT)[:, :5].transpose(0, 1)
    assert torch.equal(heads_linear(heads, weight), expected)
