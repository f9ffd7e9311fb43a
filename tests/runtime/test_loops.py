"""An engine on a CPU with and without the loops that numba compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.dispatch import compiles_loops
from runtime import Engine, EngineConfig, SamplingParams
from tests.runtime.engines import TINY, chats

pytestmark = pytest.mark.skipif(not compiles_loops(), reason="no numba, or no CPU it is used for")

ROOT = Path(__file__).resolve().parents[2]


def run(dtype: str, quantization: str) -> dict[str, Any]:
    """Greedy answers of the embedded model, and how much was compiled while it answered."""
    engine = Engine.from_checkpoint(
        EngineConfig(
            model=str(TINY), device="cpu", dtype=dtype, quantization=quantization, num_threads=1
        )
    )
    assert engine.tokenizer is not None
    num_compiled = _num_compiled()
    prompts = [engine.tokenizer.encode_chat(chat).token_ids for chat in chats()[:6]]
    answers = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40))
    return {
        "tokens": [answer.token_ids for answer in answers],
        "loops": num_compiled,
        "compiled": _num_compiled() - num_compiled,
    }


def _num_compiled() -> int:
    native = sys.modules.get("kernels.native")
    return 0 if native is None else len(native._callbacks)


def run_in_process(dtype: str, quantization: str, **environment: str) -> dict[str, Any]:
    code = (
        "import json\nfrom tests.runtime.test_loops import run\n"
        f"print(json.dumps(run({dtype!r}, {quantization!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    ("dtype", "quantization", "num_equal"),
    # bf16 rounds ties to either side
    [
        ("float32", "auto", 6),
        ("bfloat16", "auto", 4),
        ("bfloat16", "int8", 4),
        ("bfloat16", "int4", 3),
    ],
)
def test_a_machine_without_numba_gives_the_same_answers(
    dtype: str, quantization: str, num_equal: int
) -> None:
    """And no request waits for a compiler where there is one."""
    plain = run_in_process(dtype, quantization, NUMBA_DISABLE_JIT="1")
    looped = run_in_process(dtype, quantization)
    assert plain["loops"] == 0 and looped["loops"] >= 3
    assert looped["compiled"] == 0
    same = [a == b for a, b in zip(plain["tokens"], looped["tokens"], strict=True)]
    assert sum(same) >= num_equal
