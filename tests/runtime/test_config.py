"""Reading of config.json and generation_config.json: both spellings, and every refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.config import (
    Fields,
    Fp8Checkpoint,
    GenerationDefaults,
    RopeConfig,
    parse_dtype,
    parse_quantization,
    parse_rope,
    read_json,
    without_attn_factor,
)
from runtime.errors import CheckpointError
from runtime.models import FAMILIES
from tests.runtime.checkpoints import (
    DEEPSEEK_V1,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    FP8,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    QWEN3,
    YARN_ROPE,
    Config,
)


def parse(config: Config) -> Any:
    family = FAMILIES[config["architectures"][0]]
    return family.parse_config(Fields(config, "config.json"), ())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not valid JSON"),
    ],
)
def test_bad_json_is_one_line_with_the_file(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_or_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="directory"):
        read_json(tmp_path)


def test_bom_and_duplicate_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 2}')
    assert read_json(path) == {"a": 2}


BAD_VALUES: list[tuple[Config, str, Any]] = [
    (LLAMA, "num_hidden_layers", -1),
    (LLAMA, "num_hidden_layers", 0),
    (LLAMA, "num_hidden_layers", 2.0),
    (LLAMA, "num_hidden_layers", True),
    (LLAMA, "num_hidden_layers", 10**30),
    (LLAMA, "hidden_size", None),
    (LLAMA, "hidden_size", "48"),
    (LLAMA, "num_attention_heads", 10),
    (LLAMA, "num_key_value_heads", 4),
    (LLAMA, "head_dim", 7),
    (LLAMA, "vocab_size", -5),
    (LLAMA, "rms_norm_eps", -1e-6),
    (LLAMA, "max_position_embeddings", 2**40),
    (LLAMA, "hidden_act", "gelu"),
    (LLAMA, "attention_bias", "no"),
    (LLAMA, "rope_theta", 0),
    (LLAMA, "rope_theta", float("inf")),
    (LLAMA, "rope_scaling", "linear"),
    (LLAMA, "partial_rotary_factor", 0.5),
    (QWEN2, "use_sliding_window", True),
    (DEEPSEEK_V3, "q_lora_rank", None),
    (DEEPSEEK_V3, "scoring_func", "softmax"),
    (DEEPSEEK_V3, "topk_method", "greedy"),
    (DEEPSEEK_V3, "n_group", 5),
    (DEEPSEEK_V3, "n_group", 12),
    (DEEPSEEK_V3, "topk_group", 5),
    (DEEPSEEK_V3, "num_experts_per_tok", 7),
    (DEEPSEEK_V3, "qk_rope_head_dim", 7),
    (DEEPSEEK_V3, "moe_layer_freq", 2),
    (DEEPSEEK_V3, "attention_bias", True),
    (DEEPSEEK_V3, "tie_word_embeddings", True),
    (DEEPSEEK_V3, "rope_interleave", False),
    (DEEPSEEK_V3, "first_k_dense_replace", 4),
    (DEEPSEEK_V3, "norm_topk_prob", None),
    (QWEN3, "use_sliding_window", True),
    (QWEN3, "attention_bias", True),
    (DEEPSEEK_V1, "norm_topk_prob", True),
    (DEEPSEEK_V1, "scoring_func", "sigmoid"),
    (DEEPSEEK_V1, "first_k_dense_replace", None),
    (DEEPSEEK_V2, "norm_topk_prob", True),
    (DEEPSEEK_V2, "scoring_func", "sigmoid"),
    (DEEPSEEK_V2, "topk_method", "noaux_tc"),
    (DEEPSEEK_V2, "topk_method", "greedy"),
    (DEEPSEEK_V2, "n_group", None),
    (DEEPSEEK_V32, "index_topk", 0),
    (DEEPSEEK_V32, "index_head_dim", 6),
    (DEEPSEEK_V32, "index_n_heads", None),
    (DEEPSEEK_V32, "indexer_rope_interleave", True),
    (DEEPSEEK_V32, "q_lora_rank", None),
]


@pytest.mark.parametrize(("config", "key", "value"), BAD_VALUES)
def test_bad_value_names_file_and_key(config: Config, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(config | {key: value})
    assert str(caught.value).startswith(f"config.json: {key}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"type": "dynamic", "factor": 2.0}, "type"),
        ({"rope_type": "longrope"}, "rope_type"),
        ({"rope_type": "linear", "type": "yarn", "factor": 4.0}, "type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": 0.0}, "factor"),
        ({**LLAMA3_ROPE, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({**LLAMA3_ROPE, "original_max_position_embeddings": None}, "original_max_position"),
        ({**YARN_ROPE, "attn_factor": "0.87"}, "attn_factor"),
        ({**YARN_ROPE, "attn_factor": 0}, "attn_factor"),
        ({**YARN_ROPE, "truncate": False}, "truncate"),
        ({**YARN_ROPE, "beta_fast": "32"}, "beta_fast"),
    ],
)
def test_bad_rope_names_the_key(rope: Config, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: rope_scaling: {key}"):
        parse(LLAMA | {"rope_scaling": rope})


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4}, LLAMA3_ROPE, YARN_ROPE])
def test_both_spellings_of_rope_are_equal(scaling: Config | None) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": scaling}
    inside = dict(scaling or {})
    kind = inside.pop("type", None) or inside.pop("rope_type", "default")
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **inside}}
    parsed = [parse_rope(Fields(config, "config.json"), 512) for config in (old, new)]
    assert parsed[0] == parsed[1]
    assert parsed[0].kind == kind
    assert parsed[0].theta == 5e5


def test_rope_defaults() -> None:
    assert parse_rope(Fields({}, "config.json"), 512) == RopeConfig()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_in_both_spellings(key: str) -> None:
    assert parse_dtype(Fields({key: "bfloat16"}, "config.json")) == torch.bfloat16
    with pytest.raises(CheckpointError, match=f'{key}: "int8" is not supported'):
        parse_dtype(Fields({key: "int8"}, "config.json"))


def test_no_dtype() -> None:
    assert parse_dtype(Fields({"dtype": None}, "config.json")) is None


def test_attn_factor_cancels_yarns_own_or_is_ignored() -> None:
    factors = [
        parse_rope(Fields(config, "config.json"), 512).attention_factor
        for config in (QWEN3, without_attn_factor(QWEN3))
    ]
    assert factors == pytest.approx([1.0, 0.1 * math.log(4) + 1], abs=1e-12)


QUANTIZATIONS: list[tuple[Config, str]] = [
    ({"quant_method": "gptq"}, "quant_method"),
    ({}, "quant_method"),
    (FP8 | {"fmt": "e5m2"}, "fmt"),
    (FP8 | {"activation_scheme": "static"}, "activation_scheme"),
    (FP8 | {"weight_block_size": [32, 32]}, "weight_block_size"),
    (FP8 | {"weight_block_size": None}, "weight_block_size"),
    (FP8 | {"scale_fmt": "e8m0"}, "scale_fmt"),
]


@pytest.mark.parametrize(("quantization", "key"), QUANTIZATIONS)
def test_other_quantizations_are_refused(quantization: Config, key: str) -> None:
    fields = Fields({"quantization_config": quantization}, "config.json")
    with pytest.raises(CheckpointError, match=rf"^config\.json: quantization_config: {key}: "):
        parse_quantization(fields)


def test_scales_of_activations_follow_the_checkpoint() -> None:
    def parsed(quantization: Config | None) -> Fp8Checkpoint | None:
        return parse_quantization(Fields({"quantization_config": quantization}, "config.json"))

    assert parsed(None) is None
    assert parsed(FP8) == Fp8Checkpoint("float32")
    assert parsed(FP8 | {"scale_fmt": "ue8m0"}) == Fp8Checkpoint("ue8m0")


def test_mtp_layers_count_only_if_present() -> None:
    family = FAMILIES["DeepseekV3ForCausalLM"]
    present = {"model.layers.3.eh_proj.weight"}
    declared = Fields(DEEPSEEK_V3, "config.json")
    undeclared = Fields(DEEPSEEK_V3 | {"num_nextn_predict_layers": 0}, "config.json")
    configs: list[Any] = [
        family.parse_config(declared, present),
        family.parse_config(declared, ()),
        family.parse_config(undeclared, present),
    ]
    assert [len(c.mtp.loaded) for c in configs] == [1, 0, 0]
    assert [len(c.mtp.ignored) for c in configs] == [0, 0, 1]


def write_generation(folder: Path, values: Config) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return GenerationDefaults.load(folder, vocab_size=100)


def test_generation_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.load(tmp_path, vocab_size=100) == GenerationDefaults()
    values = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "eos_token_id": [1, 7]}
    assert write_generation(tmp_path, values) == GenerationDefaults(
        temperature=0.6, top_p=0.95, eos_token_ids=(1, 7)
    )
    assert write_generation(tmp_path, {"eos_token_id": 3}).eos_token_ids == (3,)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"do_sample": 1}, "do_sample"),
    ],
)
def test_bad_generation_config(tmp_path: Path, values: Config, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key}: "):
        write_generation(tmp_path, values)
