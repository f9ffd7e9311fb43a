"""What is refused at the door, with the value and the limit in the message."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.admission import admit
from runtime.engine_config import EngineConfig, EngineInfo, resolve_pages
from runtime.errors import BadRequest, ConfigError, ContextLengthExceeded
from runtime.request import SamplingParams

INFO = EngineInfo(
    model="m",
    architecture="a",
    num_parameters=1,
    weight_bytes=4,
    device="cpu",
    dtype="float32",
    quantization="none",
    max_model_len=10,
    max_num_seqs=2,
    max_step_tokens=8,
    page_size=4,
    num_pages=3,
    kv_cache_bytes=1,
    vocab_size=100,
    eos_token_ids=(1,),
)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "expected"), [(9, None, 1), (4, None, 6), (4, 3, 3), (4, 99, 6)]
)
def test_max_tokens_is_clamped_to_the_context(
    num_prompt: int, max_tokens: int | None, expected: int
) -> None:
    seq = admit(0, [5] * num_prompt, SamplingParams(max_tokens=max_tokens), INFO)
    assert seq.max_new_tokens == expected


@pytest.mark.parametrize("num_prompt", [10, 11, 5000])
def test_a_prompt_without_room_for_a_token_names_both_numbers(num_prompt: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=rf"10 tokens.*{num_prompt} tokens") as caught:
        admit(0, [5] * num_prompt, SamplingParams(), INFO)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompt_ids", "params", "param"),
    [
        ([], SamplingParams(), "messages"),
        ([100], SamplingParams(), "messages"),
        ([-1], SamplingParams(), "messages"),
        ([5], SamplingParams(stop_token_ids=(100,)), "stop_token_ids"),
        ([5], SamplingParams(logit_bias=((3, 1.0), (100, 1.0))), "logit_bias"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(
    prompt_ids: list[int], params: SamplingParams, param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        admit(0, prompt_ids, params, INFO)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("top_k", -2),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", 2**63),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop", ("x" * 257,)),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, math.nan),)),
    ],
)
def test_sampling_ranges(name: str, value: object) -> None:
    with pytest.raises(BadRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"page_size": 12}, "--page-size"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be between 1 and 4096, got 0"),
        ({"num_threads": 0}, "--threads"),
    ],
)
def test_flags_that_cannot_work_name_value_and_choice(
    flags: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="m", **flags)


def resolve(**flags: int) -> tuple[int, int, int]:
    return resolve_pages(
        EngineConfig(model="m", **flags),
        device=torch.device("cpu"),
        bytes_per_token=1000,
        model_max_len=4096,
    )


def test_pages_never_exceed_what_every_sequence_at_full_length_uses() -> None:
    num_pages, max_model_len, max_num_seqs = resolve(max_model_len=100, max_num_seqs=3)
    assert (num_pages, max_model_len, max_num_seqs) == (3 * 7, 100, 3)


def test_a_small_cache_shrinks_the_context_unless_it_was_asked_for() -> None:
    num_pages, max_model_len, _ = resolve(kv_cache_memory=16_000 * 11)
    assert (num_pages, max_model_len) == (10, 160)
    with pytest.raises(ConfigError, match=r"--max-model-len 200 needs .* lower it to 160"):
        resolve(kv_cache_memory=16_000 * 11, max_model_len=200)


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 5000 is above the 4096"):
        resolve(max_model_len=5000)
    with pytest.raises(ConfigError, match="one page takes 16000"):
        resolve(kv_cache_memory=16_000)
    with pytest.raises(ConfigError, match="bytes free on cpu"):
        resolve(kv_cache_memory=1 << 49)
