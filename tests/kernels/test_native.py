"""What is particular to the compiled loops of a CPU: rounding, NaN, threads, tiles, the cache.

That they compute what they should is tested with their ops, beside torch's bodies (`cpu_body`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.attention import paged_attention
from kernels.attention_sdpa import native_keys
from kernels.dispatch import compiles_loops
from kernels.norm import add_rms_norm, rms_norm
from kernels.packed_linear import PackedWeight, pack_matrix, packed_linear
from tests.kernels.paged import make_pages, oracle_attention
from tests.kernels.passes import TOLERANCE, assert_matches, assert_test_has_power
from tests.kernels.test_attention import make
from tests.kernels.test_linear import draw

pytestmark = pytest.mark.skipif(not compiles_loops(), reason="no numba, or no CPU it is used for")

LOOPS = [torch.float32, torch.bfloat16]
SHAPES = [(64, 64), (192, 96), (448, 160), (64, 4864), (576, 1536)]  # outputs, inputs
EVERY_BF16 = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pack(weight: Tensor) -> PackedWeight:
    packed = pack_matrix(weight, "dtype")
    assert isinstance(packed, PackedWeight)
    if packed.rows is None:
        pytest.skip("this CPU's oneDNN packs weights in another way")
    return packed


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOOPS)
def test_products_of_few_rows(
    dtype: torch.dtype, shape: tuple[int, int], with_bias: bool, threads: int
) -> None:
    weight = draw(*shape, seed=1).to(dtype)
    bias = draw(shape[0], seed=2).to(dtype) if with_bias else None
    packed = pack(weight)
    assert packed.rows is not None
    for num_rows in range(1, packed.rows.max_rows + 2):
        x = draw(num_rows, shape[1] + 9).to(dtype)[:, 4:-5]  # rows of a wider tensor
        oracle = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        actual = packed_linear(x, packed, bias)
        assert actual.dtype == dtype
        assert_matches(actual, oracle)
        assert_test_has_power(actual, oracle)


@pytest.mark.parametrize("dtype", LOOPS)
def test_bits_follow_neither_threads_nor_the_place_of_a_row(dtype: torch.dtype) -> None:
    """In bf16 they do follow how many rows there are: few are summed by vectors, more by tiles."""
    packed, x = pack(draw(576, 1536, seed=1).to(dtype)), draw(16, 1536).to(dtype)
    before = torch.get_num_threads()
    for rows in (x[:1], x[:4], x):
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results += [packed_linear(rows, packed), packed_linear(rows.flip(0), packed).flip(0)]
        torch.set_num_threads(before)
        # oneDNN's own fp32 kernels follow the number of threads
        if dtype == torch.bfloat16 or len(rows) == 1:
            assert all(torch.equal(result, results[0]) for result in results)


def test_tiles_are_given_back() -> None:
    """OneDNN's kernels of the same threads find tiles as they need them, and so do ours."""
    packed, x = pack(draw(256, 512, seed=1).bfloat16()), draw(200, 512).bfloat16()
    many, few = packed_linear(x, packed), packed_linear(x[:9], packed)
    for num_rows in (5, 16, 9):
        packed_linear(x[:num_rows], packed)
        assert torch.equal(packed_linear(x, packed), many)
    assert torch.equal(packed_linear(x[:9], packed), few)


def test_every_value_is_rounded_as_torch_does() -> None:
    """Sums of every bf16 with some: ties, overflow to infinity, subnormals, NaN."""
    x = EVERY_BF16.repeat(4, 1)
    others = torch.tensor([0.0, 1.0, 3.3e38, 0.00390625]).bfloat16()
    residual = others[:, None].expand(x.shape).contiguous()
    _, total = add_rms_norm(x, residual, torch.ones(x.shape[1]).bfloat16(), 1e-6)
    expected = x + residual
    assert torch.equal(total.isnan(), expected.isnan())
    assert torch.equal(total[~total.isnan()], expected[~total.isnan()])


def test_gates_of_any_size() -> None:
    gates = torch.cat([torch.linspace(-86, 86, 100_001), EVERY_BF16[EVERY_BF16.isfinite()].float()])
    ones = torch.ones_like(gates)
    actual = silu_and_mul(torch.cat((gates, ones)).view(1, -1))[0].double()
    expected = torch.nn.functional.silu(gates.double())
    error = (actual - expected).abs() / expected.abs().clamp(min=1e-30)
    assert float(error[gates > -86].max()) < 5e-7
    assert bool((actual[gates <= -86].abs() < 1e-30).all())


@pytest.mark.parametrize("dtype", LOOPS)
def test_nan_stays_where_it_is(dtype: torch.dtype) -> None:
    """It is what tells a broken sequence from its neighbours."""
    x = draw(3, 96).to(dtype)
    x[1, 40] = float("nan")
    normed = rms_norm(x, torch.ones(96, dtype=dtype), 1e-6)
    gated = silu_and_mul(x)
    assert normed.isnan().all(dim=1).tolist() == [False, True, False]
    assert gated.isnan().sum(dim=1).tolist() == [0, 1, 0]
    if dtype == torch.bfloat16:
        lengths = [(1, 40), (1, 30), (1, 70)]
        pages = make_pages(lengths, 16, "cpu")
        q, k, v = make(lengths, (4, 2, 32, 32), dtype)
        k[1, 7, :, 0] = float("nan")
        out = paged_attention(
            q, pages.scatter(k, dtype, "cpu"), pages.scatter(v, dtype, "cpu"), pages.batch, 0.2
        )
        assert out.isnan().flatten(1).all(dim=1).tolist() == [False, True, False]


def test_what_a_loop_would_read_wrongly_is_refused() -> None:
    packed = pack(draw(64, 64, seed=1).bfloat16())
    for x, bias in [
        (draw(1, 64), None),
        (draw(1, 62).bfloat16(), None),
        (draw(1, 128).bfloat16()[:, ::2], None),
        (draw(1, 64).bfloat16(), draw(64)),
        (draw(1, 64).bfloat16(), draw(10).bfloat16()),
    ]:
        with pytest.raises(ValueError, match="for"):
            packed_linear(x, packed, bias)


def test_other_threads_of_python_run_meanwhile() -> None:
    """Those of a process that has an engine beside other things."""
    packed, x = pack(draw(32768, 1024, seed=1).bfloat16()), draw(8, 1024).bfloat16()
    packed_linear(x, packed)
    done, counted = threading.Event(), [0]

    def count() -> None:
        while not done.is_set():
            time.sleep(0)
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    for _ in range(20):
        packed_linear(x, packed)
    during = counted[0] - before
    done.set()
    thread.join()
    assert during > 20


def test_a_damaged_cache_is_done_without(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from kernels.dispatch import compiles_loops\n"
        "from kernels.norm import rms_norm\n"
        "print(rms_norm(torch.ones(1, 64), torch.ones(64), 0.0).sum().item(), compiles_loops())"
    )
    for damage in (b"", b"no pickle", None):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).resolve().parents[2],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["64.0", "True"]
        files = [*tmp_path.rglob("*.nbi")]
        assert files
        if damage is not None:
            for file in files:
                file.write_bytes(damage)


def test_without_a_folder_to_keep_code_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import native, native_rows

    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    address = native.entry.__wrapped__(native_rows._rms_norm_fp32)
    x, weight = draw(1, 64), draw(64, seed=1)
    out = torch.empty_like(x)
    pointers = [t.data_ptr() for t in (x, weight, out)]
    native.launch(address, 64, 1e-6, pointers[0], 0, *pointers[1:], pointers[2], 1, 64, 64)
    oracle = weight.double() * x.double() / (x.double().square().mean() + 1e-6).sqrt()
    assert float((out - oracle).abs().max()) < TOLERANCE[torch.float32]


def test_loops_of_other_cpus_compile(tmp_path: Path) -> None:
    """Those by tiles, where the machine that tests has none: LLVM knows each instruction."""
    code = (
        "from kernels import native, native_int8, native_linear\n"
        "for function in (native_linear._multiply_tiles, native_linear._multiply_dots,\n"
        "                 native_int8._multiply_bf16_by_tiles,\n"
        "                 native_int8._multiply_bf16_by_vectors):\n"
        "    assert native.entry(function)\n"
    )
    features = (
        "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512bf16,"
        "+amx-tile,+amx-bf16,+amx-int8"
    )
    environment = os.environ | {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True, timeout=300)


# query heads, KV heads, dimensions
@pytest.mark.parametrize("heads", [(5, 1, 32), (14, 2, 64), (4, 4, 96), (6, 2, 128), (16, 1, 256)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_decodes_over_pages(heads: tuple[int, int, int], page_size: int, threads: int) -> None:
    """Contexts that end anywhere in a tile of keys; slots after them hold NaN."""
    num_heads, num_kv_heads, dim = heads
    lengths = [(1, context) for context in (1, 2, 15, 16, 17, 31, 64, 65, 500, 3001)]
    pages = make_pages(lengths, page_size, "cpu")
    q, k, v = make(lengths, (num_heads, num_kv_heads, dim, dim), torch.bfloat16)
    caches = [pages.scatter(x, torch.bfloat16, "cpu") for x in (k, v)]
    if not native_keys(caches[0]):
        pytest.skip("this CPU has no AVX-512")
    actual = paged_attention(q, *caches, pages.batch, dim**-0.5)
    oracle = oracle_attention(q, k, v, pages.batch, dim**-0.5)
    assert_matches(actual, oracle)
    assert_test_has_power(actual, oracle)


def test_decodes_that_loops_do_not_take_are_attended_too() -> None:
    """Beside others: longer contexts, chunks; and sizes that no vector divides."""
    for dim, page_size in ((64, 16), (80, 16), (64, 8)):
        lengths = [(1, 9000), (1, 30), (1, 8200), (1, 8192), (4, 90)]
        pages = make_pages(lengths, page_size, "cpu")
        q, k, v = make(lengths, (4, 2, dim, dim), torch.bfloat16)
        caches = [pages.scatter(x, torch.bfloat16, "cpu") for x in (k, v)]
        actual = paged_attention(q, *caches, pages.batch, dim**-0.5)
        assert_matches(actual, oracle_attention(q, k, v, pages.batch, dim**-0.5))
