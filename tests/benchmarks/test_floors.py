"""The floors agree with the table that was computed by hand from the released configs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.floors import Floor, model_floor
from benchmarks.machine import ROOT
from benchmarks.offline import checkpoint_floor
from benchmarks.random_models import build, config_json, fill

H200_BYTES_PER_S = 4.3e12  # usable, measured by a device copy
H200_FLOPS = 790e12


def floor_of(name: str) -> Floor:
    meta = torch.device("meta")
    model = build(config_json(name), device=meta, dtype=torch.bfloat16, max_model_len=1)
    return model_floor(model, cache_itemsize=2)


# model, GB read by a step of one sequence, cache bytes per token, GFLOP per prompt token
@pytest.mark.parametrize(
    ("name", "gigabytes", "cache_bytes", "gigaflops"),
    [
        ("r1_distill_qwen_1.5b", 3.09, 28672, 2.62),
        ("r1_distill_qwen_7b", 14.14, 57344, 13.05),
        ("r1_distill_llama_8b", 15.01, 131072, 13.96),
        ("r1_distill_qwen_14b", 27.98, 196608, 26.42),
        ("v2_lite", 4.90, 31104, 4.48),
    ],
)
def test_what_a_step_reads(name: str, gigabytes: float, cache_bytes: int, gigaflops: float) -> None:
    floor = floor_of(name)
    # routers are fp32 in this engine, 2 bytes a number in the table: 7 MB in V2-Lite
    assert floor.weight_bytes(1) / 1e9 == pytest.approx(gigabytes, abs=0.012)
    assert floor.cache_bytes_per_token == cache_bytes
    assert 2 * floor.params_per_token / 1e9 == pytest.approx(gigaflops, abs=0.006)


@pytest.mark.parametrize(
    ("name", "batch", "context", "tok_s"),
    [
        ("r1_distill_qwen_1.5b", 1, 1024, 1380),
        ("r1_distill_qwen_1.5b", 256, 8192, 17413),
        ("r1_distill_qwen_7b", 1, 1024, 303),
        ("r1_distill_qwen_7b", 8, 32768, 1179),
        ("r1_distill_qwen_7b", 64, 8192, 6225),
        ("r1_distill_llama_8b", 64, 1024, 11661),
        ("v2_lite", 1, 1024, 871),
        ("v2_lite", 8, 1024, 1895),
        ("v2_lite", 64, 8192, 5825),
        ("v2_lite", 256, 1024, 28120),
    ],
)
def test_tokens_per_second_that_the_bus_allows(
    name: str, batch: int, context: int, tok_s: float
) -> None:
    seconds = floor_of(name).step_bytes(batch, context) / H200_BYTES_PER_S
    assert batch / seconds == pytest.approx(tok_s, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "milliseconds"),
    [("r1_distill_qwen_1.5b", 34), ("r1_distill_qwen_7b", 152), ("v2_lite", 58)],
)
def test_the_time_of_a_prompt_of_8k(name: str, milliseconds: float) -> None:
    seconds = floor_of(name).prompt_flops(8192) / H200_FLOPS
    assert seconds * 1e3 == pytest.approx(milliseconds, abs=0.5)


def test_a_step_of_v3_reads_its_37_g_active_parameters() -> None:
    floor = floor_of("v3")
    assert floor.cache_bytes_per_token == 61 * 576 * 2
    assert floor.weight_bytes(1) / 1e9 == pytest.approx(73.5, abs=0.1)


def test_a_tied_head_is_read_once() -> None:
    config = config_json("r1_distill_qwen_1.5b", tiny=True)
    sizes = []
    for tied in (False, True):
        model = build(
            config | {"tie_word_embeddings": tied},
            device=torch.device("meta"),
            dtype=torch.bfloat16,
            max_model_len=1,
        )
        sizes.append(model_floor(model, 2).weight_bytes(1))
    assert sizes[0] == sizes[1]


def test_int8_and_int4_read_fewer_bytes() -> None:
    """Of the embedded model; some of its matrices do not divide into int4 groups."""
    model = str(ROOT / "weights" / "fathom-tiny")
    whole, num_bytes = checkpoint_floor(model, torch.bfloat16)
    int8, same_bytes = checkpoint_floor(model, torch.bfloat16, "int8")
    int4, _ = checkpoint_floor(model, torch.bfloat16, "int4")
    assert num_bytes == same_bytes
    assert 0.5 < int8.weight_bytes(8) / whole.weight_bytes(8) < 0.52
    assert 0.3 < int4.weight_bytes(8) / whole.weight_bytes(8) < 0.5
    assert int8.cache_bytes_per_token == whole.cache_bytes_per_token


def test_random_weights_are_spread_and_norms_stand_around_one() -> None:
    model = build(
        config_json("v2_lite", tiny=True),
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_model_len=16,
    )
    fill(model, torch.device("cpu"))
    for name, target in model.weight_targets().items():
        assert 0.01 < float(target.std()) < 0.03, name
        assert abs(float(target.mean()) - name.endswith("norm.weight")) < 0.02, name
