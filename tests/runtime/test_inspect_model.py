"""The 22 released configs: real shapes on the meta device, sizes as published, what fits where."""

from __future__ import annotations

import json
import resource
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.config import Fields
from runtime.engine_config import EngineConfig, resolve_pages
from runtime.errors import CheckpointError
from runtime.inspect_model import (
    LAYOUTS,
    Gpu,
    ModelReport,
    context_left,
    describe_model,
    find_gpus,
    imagine_gpu,
)
from runtime.models import FAMILIES
from runtime.models.deepseek_v4 import DeepseekV4Config, Storage
from runtime.models.deepseek_v4_layout import tensor_layout
from runtime.models.layers import SCALE_SUFFIX, Fp8Format, Placement

ROOT = Path(__file__).parents[2]
RELEASED: dict[str, dict[str, Any]] = {
    name: entry["config"]
    for name, entry in json.loads((ROOT / "benchmarks/released_configs.json").read_text()).items()
}
GIB = 1 << 30
GPUS = {24: 24 * GIB, 48: 48 * GIB, 80: 80 * GIB, 141: int(139.8 * GIB)}

Row = namedtuple("Row", "parameters bf16 fp8 cache")
# Billions of parameters, GB in bf16 (of the main model) and in FP8, cache bytes per token, as
# published or computed independently, as exact as they were written down. V4.1's official number
# is 552; FP8 of V3 and V3.2 is their release, with the MTP layer.
TABLE = {
    "llm_7b": Row("6.910", "13.8", 7.7, 491_520),
    "llm_67b": Row("67.425", "134.9", 69.1, 389_120),
    "coder_1.3b": Row("1.346", "2.7", 1.5, 196_608),
    "coder_5.7bmqa": Row("5.700", "11.4", 6.0, 16_384),
    "coder_6.7b": Row("6.741", "13.5", 7.0, 524_288),
    "coder_33b": Row("33.343", "66.7", 33.8, 253_952),
    "moe_16b": Row("16.4", "32.8", 16.8, 229_376),
    "v2_lite": Row("15.706", "31.4", 16.1, 31_104),
    "v2": Row("235.741", "471.5", 236.8, 69_120),
    "v3": Row("671.026", "1342", 688.6, 70_272),
    "v31": Row("671.026", "1342", 688.6, 70_272),
    "v32": Row("671.878", "1344", 690, 70_272 + 15_616),
    "v4_flash": Row("284.3", "568.7", None, 6_880),
    "v4_pro": Row("1573", "3146", None, 9_848),
    "v41_flash": Row("552", None, None, 3_200),
    "r1_distill_qwen_1.5b": Row("1.777", "3.6", 2.2, 28_672),
    "r1_distill_qwen_7b": Row("7.616", "15.2", 8.7, 57_344),
    "r1_distill_qwen_14b": Row("14.770", "29.5", 16.3, 196_608),
    "r1_distill_qwen_32b": Row("32.764", "65.5", 34.3, 262_144),
    "r1_distill_llama_8b": Row("8.030", "16.1", 9.1, 131_072),
    "r1_distill_llama_70b": Row("70.554", "141.1", 72.7, 327_680),
    "r1_0528_qwen3_8b": Row("8.191", "16.4", 9.4, 147_456),
}
# Beside the main model, in billions. MTP: the hub's 684.49 less 671.03.
EXTRA = {
    "v3": {"MTP": "13.46"},
    "v31": {"MTP": "13.46"},
    "v32": {"MTP": "13.48"},
    "v4_flash": {"MTP": "6.6"},
    "v4_pro": {"MTP": "25.8"},
    "v41_flash": {"DSpark": "14.2", "Engram": "196.6"},
}
ACTIVE = {
    "moe_16b": "2.8",
    "v2_lite": "2.4",
    "v2": "21",
    "v3": "37",
    "v31": "37",
    "v32": "37",
    "v4_flash": "13",
    "v4_pro": "49",
    "v41_flash": "16",
}
# Thousands of tokens beside the weights on cards of so many GB; None: does not fit.
FITS = [
    ("llm_7b", "bf16", {24: 19, 48: 69, 80: 135, 141: 260}),
    ("llm_7b", "fp8", {24: 32}),
    ("llm_67b", "bf16", {24: None, 48: None, 80: None, 141: 17}),
    ("llm_67b", "fp8", {24: None, 48: None, 80: 29, 141: 186}),
    ("coder_1.3b", "bf16", {24: 105}),
    ("coder_6.7b", "bf16", {24: 19, 48: 65, 80: 127, 141: 244}),
    ("coder_6.7b", "fp8", {24: 31}),
    ("coder_33b", "bf16", {24: None, 48: None, 80: 54, 141: 294}),
    ("coder_33b", "fp8", {24: None, 48: 55, 80: 184}),
    ("moe_16b", "bf16", {24: None, 48: 66, 80: 208, 141: 474}),
    ("moe_16b", "fp8", {24: 29}),
    ("v2_lite", "bf16", {24: None, 48: 532}),
    ("v2_lite", "fp8", {24: 237}),
    ("v2", "fp8", {24: None, 48: None, 80: None, 141: None}),
    ("v3", "fp8", {24: None, 48: None, 80: None, 141: None}),
    ("v32", "fp8", {24: None, 48: None, 80: None, 141: None}),
    ("r1_distill_qwen_1.5b", "bf16", {24: 693}),
    ("r1_distill_qwen_7b", "bf16", {24: 144}),
    ("r1_distill_qwen_14b", "bf16", {24: None, 48: 93, 80: 259, 141: 570}),
    ("r1_distill_qwen_14b", "fp8", {24: 36}),
    ("r1_distill_qwen_32b", "bf16", {24: None, 48: None, 80: 57, 141: 290}),
    ("r1_distill_qwen_32b", "fp8", {24: None, 48: 52, 80: 176}),
    ("r1_distill_llama_8b", "bf16", {24: 56}),
    ("r1_0528_qwen3_8b", "bf16", {24: 48}),
    ("r1_distill_llama_70b", "bf16", {24: None, 48: None, 80: None, 141: None}),
    ("r1_distill_llama_70b", "fp8", {24: None, 48: None, 80: 24, 141: 210}),
]


@pytest.fixture
def describe(tmp_path: Path) -> Any:
    """The report on a config.json with no file beside it."""

    def report(config: dict[str, Any]) -> ModelReport:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return describe_model(str(tmp_path))

    return report


def in_billions(count: int, like: str) -> str:
    """Billions with as many decimals as ``like`` has."""
    return f"{count / 1e9:.{len(like.partition('.')[2])}f}"


def family_tensors(
    name: str, fp8: Fp8Format | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Every weight of a model, all experts built, and the prefixes of its draft layers."""
    config = RELEASED[name]
    family = FAMILIES[config["architectures"][0]]
    first = config["num_hidden_layers"]
    drafts = range(first, first + config.get("num_nextn_predict_layers", 0))
    names = [f"model.layers.{i}.eh_proj.weight" for i in drafts]
    model = family.build(
        family.parse_config(Fields(config, name), names),
        Placement(torch.device("meta"), torch.bfloat16, fp8),
        1,
    )
    prefixes = tuple(f"model.layers.{i}." for i in drafts)
    return model.weight_targets(), prefixes or ("none",)


def v4_config(config: dict[str, Any]) -> DeepseekV4Config:
    return LAYOUTS[config["architectures"][0]](Fields(config, "config.json"), ())


def released_size(config: DeepseekV4Config) -> tuple[int, int]:
    """Tensors and bytes of a release: scales are tensors of their own."""
    layout = tensor_layout(config).values()
    scaled = (Storage.FP4, Storage.FP8, Storage.FP8_ROWS)
    num_tensors = len(layout) + sum(tensor.storage in scaled for tensor in layout)
    return num_tensors, sum(tensor.stored_bytes(config.block_size) for tensor in layout)


def test_all_22_released_configs_are_in_the_table() -> None:
    assert len(RELEASED) == 22
    assert TABLE.keys() == RELEASED.keys()


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_cache_are_those_of_the_table(name: str, describe: Any) -> None:
    report = describe(RELEASED[name])
    expected = TABLE[name]
    assert in_billions(report.num_parameters, expected.parameters) == expected.parameters
    extra = {
        part: in_billions(count, EXTRA[name][part])
        for part, count in report.extra_parameters.items()
    }
    assert extra == EXTRA.get(name, {})
    assert sum(report.cache_bytes_per_token.values()) == expected.cache


@pytest.mark.parametrize("name", [n for n in TABLE if n not in ("v4_flash", "v4_pro", "v41_flash")])
def test_real_shapes_build_on_the_meta_device_and_hold_what_the_report_says(
    name: str, describe: Any
) -> None:
    report = describe(RELEASED[name])
    tensors, draft_prefixes = family_tensors(name)
    assert all(tensor.is_meta for tensor in tensors.values())
    main = sum(t.numel() for key, t in tensors.items() if not key.startswith(draft_prefixes))
    assert in_billions(main, TABLE[name].parameters) == TABLE[name].parameters
    assert report.num_parameters == main
    drafts = sum(t.numel() for key, t in tensors.items() if key.startswith(draft_prefixes))
    assert sum(report.extra_parameters.values()) == drafts
    fp8_tensors, _ = family_tensors(name, Fp8Format())
    assert any(key.endswith(SCALE_SUFFIX) for key in fp8_tensors)
    assert report.weight_bytes == {
        "bf16": sum(t.nbytes for t in tensors.values()),
        "fp8": sum(t.nbytes for t in fp8_tensors.values()),
    }


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro", "v41_flash"])
def test_real_shapes_of_v4_build_on_the_meta_device(name: str, describe: Any) -> None:
    report = describe(RELEASED[name])
    assert not report.can_run
    layout = tensor_layout(v4_config(RELEASED[name]))
    numel = sum(
        torch.empty(tensor.shape, device="meta").numel()
        for tensor in layout.values()
        if tensor.storage is not Storage.IDS
    )
    assert report.num_parameters + sum(report.extra_parameters.values()) == numel


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name].bf16])
def test_bytes_of_each_precision_are_those_of_the_table(name: str, describe: Any) -> None:
    report, expected = describe(RELEASED[name]), TABLE[name]
    assert in_billions(2 * report.num_parameters, expected.bf16) == expected.bf16
    num_parameters = report.num_parameters + sum(report.extra_parameters.values())
    # The router stays float32.
    assert report.weight_bytes["bf16"] == pytest.approx(2 * num_parameters, rel=3e-4)
    if expected.fp8:  # kv_b_proj is decoded at load, and the scales take their part
        assert report.weight_bytes["fp8"] / 1e9 == pytest.approx(expected.fp8, rel=0.01, abs=0.06)


@pytest.mark.parametrize(
    ("name", "draft", "num_tensors", "num_bytes"),
    [
        # V4-Flash-0731 and V4-Pro-0813: the earlier configs with the DSpark block they added.
        ("v4_flash", {"rank": 256, "layers": [40, 41, 42]}, 72_317, 166_878_536_440),
        ("v4_pro", {"rank": 512, "layers": [58, 59, 60]}, 149_782, 892_727_580_904),
    ],
)
def test_v4_layouts_are_the_releases_to_the_byte(
    name: str, draft: dict[str, Any], num_tensors: int, num_bytes: int, describe: Any
) -> None:
    config = RELEASED[name] | {
        "dspark_block_size": 5,
        "dspark_markov_rank": draft["rank"],
        "dspark_target_layer_ids": draft["layers"],
    }
    assert released_size(v4_config(config)) == (num_tensors, num_bytes)
    assert describe(config).weight_bytes["fp4"] == num_bytes


@pytest.mark.parametrize(("name", "gigabytes"), [("v4_flash", 160), ("v4_pro", 865)])
def test_v4_previews_take_what_was_released(name: str, gigabytes: int, describe: Any) -> None:
    assert round(describe(RELEASED[name]).weight_bytes["fp4"] / 1e9) == gigabytes


def test_v41_takes_what_was_released_less_its_vision_tower(describe: Any) -> None:
    num_tensors, num_bytes = released_size(v4_config(RELEASED["v41_flash"]))
    assert describe(RELEASED["v41_flash"]).weight_bytes["fp4"] == num_bytes
    assert 0 < 96_085 - num_tensors < 500
    assert 0 < 510_286_023_000 - num_bytes < 0.002 * 510_286_023_000


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_near_the_published(name: str, describe: Any) -> None:
    """Some papers count the embeddings; we do not, since a token looks one row of them up."""
    report, config = describe(RELEASED[name]), RELEASED[name]
    text = config.get("text_config", config)
    embeddings = text["vocab_size"] * text["hidden_size"] / 1e9
    active = report.num_active_parameters / 1e9
    last_digit = 10 ** -len(ACTIVE[name].partition(".")[2])
    assert active - last_digit <= float(ACTIVE[name]) <= active + embeddings + last_digit


def test_every_parameter_of_a_dense_model_is_active(describe: Any) -> None:
    assert describe(RELEASED["llm_7b"]).num_active_parameters is None


@pytest.mark.parametrize(("name", "precision", "expected"), FITS)
def test_what_fits_is_what_the_table_says(
    name: str, precision: str, expected: dict[int, int | None], describe: Any
) -> None:
    report = describe(RELEASED[name])
    for size, thousands in expected.items():
        left = context_left(report, precision, imagine_gpu(f"{size} GB", GPUS[size]))
        if thousands is None:
            assert left is None
        else:
            assert left is not None
            assert left / 1000 == pytest.approx(thousands, rel=0.025, abs=1)


@pytest.mark.parametrize("name", ["llm_7b", "moe_16b", "v2_lite", "r1_distill_qwen_14b"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_context_left_is_the_cache_that_serve_makes(
    name: str, precision: str, describe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = describe(RELEASED[name])
    gpu = Gpu("a card", 48 * GIB, 47 * GIB)
    free = gpu.free - report.weight_bytes[precision]
    monkeypatch.setattr("runtime.engine_config.available_memory", lambda device: free)
    num_pages, _, _ = resolve_pages(
        EngineConfig(model=name),
        device=torch.device("cuda"),
        bytes_per_token=sum(report.cache_bytes_per_token.values()),
        model_max_len=report.max_position_embeddings,
    )
    assert context_left(report, precision, gpu) == num_pages * 16


def test_less_than_4096_tokens_is_no_fit_unless_the_model_is_shorter(describe: Any) -> None:
    config = RELEASED["llm_7b"]
    report = describe(config)
    taken = report.weight_bytes["bf16"] + GIB
    page = 16 * 491_520
    enough = Gpu("enough", 24 * GIB, taken + 257 * page)
    short = Gpu("short", 24 * GIB, taken + 256 * page)
    assert context_left(report, "bf16", enough) == 4096
    assert context_left(report, "bf16", short) is None
    shorter = describe(config | {"max_position_embeddings": 2048})
    assert context_left(shorter, "bf16", short) == 4080


def test_gpus_are_found_with_what_is_free_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(device: int) -> tuple[int, int]:
        if device == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 20 * GIB, 24 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name=f"card {device}", total_memory=24 * GIB),
    )
    assert find_gpus() == [Gpu("card 0", 24 * GIB, 20 * GIB), Gpu("card 1", 24 * GIB, 0)]


def lies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Configs whose every value is allowed, and which together describe no model there is."""
    v3, v4, v41 = RELEASED["v3"], RELEASED["v4_flash"], RELEASED["v41_flash"]
    yield "v3", v3 | {"num_hidden_layers": 1024, "n_routed_experts": 8192}
    yield (
        "llama",
        RELEASED["llm_7b"]
        | {
            "num_hidden_layers": 1024,
            "hidden_size": 1 << 20,
            "intermediate_size": 1 << 20,
            "head_dim": 128,
        },
    )
    yield (
        "rows",
        RELEASED["llm_7b"]
        | {
            "num_hidden_layers": 1024,
            "hidden_size": 8,
            "num_attention_heads": 4096,
            "num_key_value_heads": 4096,
            "head_dim": 1024,
        },
    )
    ratios = [4] * 1024
    yield (
        "v4",
        v4
        | {
            "num_hidden_layers": 1024,
            "n_routed_experts": 8192,
            "compress_ratios": ratios,
        },
    )
    text = v41["text_config"] | {
        "dspark_n_routed_experts": 8192,
        "dspark_target_layer_ids": [0] * 2048,
    }
    yield "v41", v41 | {"text_config": text}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in lies()])
def test_a_config_that_lies_about_its_size_is_refused_at_once(
    config: dict[str, Any], describe: Any
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    with pytest.raises(CheckpointError, match=r"config\.json: .* at most"):
        describe(config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
