"""Times every op of a step at released shapes against what the machine can do.

us        microseconds of one call, the median over replays of a graph of many calls
percent   of the larger of: bytes / memory bandwidth, operations / matmul rate, one launch
torch     how many times as long torch's own call takes, in the same run
invariant how many times as long the op takes when a row's bits must not follow the batch

python -m benchmarks.kernels [--device cpu --tiny]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks import attention_cases as others
from benchmarks import product_cases as products
from benchmarks.ceilings import ceilings_of
from benchmarks.kernel_inputs import FULL, INVARIANT, OURS, TINY, TORCH, Case, Maker
from benchmarks.part import Part, Row, parse_part
from benchmarks.timing import time_calls


def measure(part: Part, case: Case) -> None:
    """Time one case and record its row."""
    ceilings = ceilings_of(part)
    work = case.prepare()
    least_of = {
        "bandwidth": work.num_bytes / ceilings["memory_bytes_per_s"],
        "matmul": work.flops / ceilings["matmul_flops_per_s"],
        "launch": ceilings["launch_s"],
    }
    bound = max(least_of, key=lambda name: least_of[name])
    least = least_of[bound]
    seconds = time_calls(work.calls(), part.device, estimate=least)
    ours = seconds[OURS]
    part.record(
        op=case.op,
        model=case.model,
        shape=case.shape,
        at=case.at,
        us=ours * 1e6,
        gb_s=work.num_bytes / ours / 1e9,
        tflop_s=work.flops / ours / 1e12,
        bound=bound,
        percent=100 * least / ours,
        torch=seconds[TORCH] / ours if TORCH in seconds else None,
        invariant=seconds[INVARIANT] / ours if INVARIANT in seconds else None,
    )


def all_cases(maker: Maker) -> Iterator[Case]:
    """Every case, what decides the speed of the first models first."""
    small, dense, llama = "r1_distill_qwen_1.5b", "r1_distill_qwen_7b", "r1_distill_llama_8b"
    yield from products.dense_linears(maker, dense)
    yield from others.decode_attention(maker, dense)
    yield from products.experts(maker, "v2_lite")
    yield from products.latent_linears(maker, "v2_lite")
    yield from others.latent_decode_attention(maker, "v2_lite")
    yield from others.samplings(maker, dense)
    yield from others.norms(maker, dense)
    yield from others.key_value_writes(maker, dense)
    yield from others.latent_writes(maker, "v2_lite")
    yield from products.heads_linears(maker, "v2_lite")
    yield from products.routers(maker, "v2_lite")
    yield from others.prompt_attention(maker, dense)
    yield from others.latent_prompt_attention(maker, "v2_lite")
    yield from products.dense_linears(maker, llama)
    yield from others.decode_attention(maker, llama)
    yield from products.dense_linears(maker, small)
    yield from others.decode_attention(maker, small)
    yield from products.fp8_linears(maker, "v3")
    yield from others.latent_decode_attention(maker, "v3")
    yield from products.heads_linears(maker, "v3")
    yield from products.routers(maker, "v3")


def cases(part: Part) -> Iterator[tuple[Row, Callable[[], None]]]:
    maker = Maker(part.device, part.dtype, TINY if part.tiny else FULL, part.tiny)
    for case in all_cases(maker):
        label = {"op": case.op, "model": case.model, "shape": case.shape, "at": case.at}
        yield label, lambda case=case: measure(part, case)


def main() -> int:
    part = parse_part(__doc__)
    ceilings_of(part)
    return part.run_cases(cases(part))


if __name__ == "__main__":
    sys.exit(main())
