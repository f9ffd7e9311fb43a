"""Models with packed linear layers: the same numbers, the same promises, no second copy."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch

from kernels import packed_linear
from kernels.int4_linear import GROUP, Int4Weight, fits_int4, quantize_int4
from kernels.int8_linear import Int8Weight, multiplies_int8, quantize_int8
from kernels.packed_linear import PackedWeight, PackFormat, pack_format
from runtime import ConfigError, EngineConfig, SamplingParams
from runtime.models import CausalLM
from runtime.models.layers import Fp8Format, Linear, Placement
from runtime.packing import bytes_added
from runtime.weights import build_model, inspect_checkpoint, load_weights, weight_bytes
from tests.runtime.checkpoints import (
    DEEPSEEK_V3,
    LLAMA,
    Tensors,
    make_tensors,
    write_checkpoint,
)
from tests.runtime.engines import TINY, chats, make_engine
from tests.runtime.pages import Pages, random_tokens
from tests.runtime.test_models import LAYOUTS, TOLERANCE

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    pack_format((1024, 1024), torch.float32, CPU, "dtype") is None,
    reason="this CPU or pass packs no weights",
)


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_linear.LEAST_VALUES, torch.float32, 0)


def load(
    folder: Path, *, packing: PackFormat | None = None, fp8: Fp8Format | None = None
) -> CausalLM:
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, Placement(CPU, torch.float32, fp8, packing=packing))
    load_weights(checkpoint, model)
    return model


def linear_layers() -> list[Linear]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Linear]


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_models_give_the_same_logits(name: str, tmp_path: Path) -> None:
    """And every layer that may be packed is: none is missed on the way through a model."""
    folder = write_checkpoint(tmp_path, LAYOUTS[name])
    fp8 = Fp8Format() if "fp8" in name else None
    tokens = random_tokens(70, 101)
    (expected,) = Pages(load(folder, fp8=fp8)).step((0, tokens, 0, 70))
    others = set(map(id, linear_layers()))
    model = load(folder, packing="dtype", fp8=fp8)
    layers = [layer for layer in linear_layers() if id(layer) not in others]
    packed = [isinstance(layer.weight, PackedWeight) for layer in layers if layer.packing]
    assert packed and all(packed)
    (logits,) = Pages(model).step((0, tokens, 0, 70))
    assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK_V3], ids=["llama", "deepseek_v3"])
def test_packed_rows_have_the_same_bits_in_chunks_and_beside_others(
    config: dict[str, object], tmp_path: Path
) -> None:
    model = load(write_checkpoint(tmp_path, config), packing="dtype")
    first, second = random_tokens(43, 101), random_tokens(29, 101, seed=1)
    (whole,) = Pages(model).step((0, first, 0, 43))
    pages = Pages(model)
    pieces = [
        pages.step((0, first, 0, 21))[0],
        pages.step((0, first, 21, 22))[0],
        pages.step((0, first, 22, 23), (1, second, 0, 17))[0],
        pages.step((1, second, 17, 18), (0, first, 23, 42))[1],
        pages.step((0, first, 42, 43), (1, second, 18, 19))[0],
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_each_unpacked_weight_is_freed_as_soon_as_it_is_packed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, LLAMA)
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, Placement(CPU, torch.float32, packing="dtype"))
    layers = [layer for layer in linear_layers() if isinstance(layer.weight, torch.Tensor)]
    weights = [weakref.ref(layer.weight) for layer in layers if layer.packing]
    del layers
    alive: list[int] = []
    load_weights(
        checkpoint,
        model,
        lambda done, total: alive.append(sum(ref() is not None for ref in weights)),
    )
    assert alive[0] == len(weights) > 4
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 1 < len(set(alive))  # the last is packed behind it
    assert not any(ref() is not None for ref in weights)


def test_a_tied_head_is_packed_and_the_embedding_stays(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, LLAMA | {"tie_word_embeddings": True})
    model = load(folder, packing="dtype")
    targets = load(folder).weight_targets()
    head, embedding = model.lm_head, model.embed_tokens  # type: ignore[attr-defined]
    assert isinstance(head.weight, PackedWeight)
    assert torch.equal(embedding, targets["model.embed_tokens.weight"])


KEPT = ("embed_tokens", ".gate.", "norm", "kv_b_proj", "eh_proj", "weights_proj", "shared_head")
"""Parts of names of what int8 and int4 leave as it is."""


def quantized(tensors: Tensors, packing: PackFormat) -> Tensors:
    """A checkpoint of the numbers that quantized matrices stand for."""
    plain = dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() != 2 or any(part in name for part in KEPT):
            continue
        if packing == "int4" and "lm_head" not in name and fits_int4(*weight.shape):
            values, scale_and_middle = quantize_int4(weight, torch.float32)
            scale, middle = scale_and_middle.repeat_interleave(GROUP, dim=0).unbind(2)
            plain[name] = ((values - 8) * scale.T + middle.T).contiguous()
        else:
            values, scales = quantize_int8(weight)
            plain[name] = values * scales[:, None]
    return plain


QUANTIZABLE = [name for name in LAYOUTS if "fp8" not in name and "tied" not in name]
LLAMA_OF_64S = LLAMA | {"hidden_size": 192, "intermediate_size": 128, "num_key_value_heads": 6}


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU multiplies no int8 exactly")
@pytest.mark.parametrize(
    ("config", "packing"),
    [
        *(pytest.param(LAYOUTS[name], "int8", id=f"{name} int8") for name in QUANTIZABLE),
        pytest.param(LLAMA_OF_64S, "int4", id="llama int4"),
        pytest.param(DEEPSEEK_V3, "int4", id="deepseek_v3, which divides into no int4 groups"),
    ],
)
def test_quantized_models_give_the_logits_of_their_rounded_weights(
    config: dict[str, object], packing: PackFormat, tmp_path: Path
) -> None:
    tensors = make_tensors(config)
    rounded = write_checkpoint(tmp_path / "rounded", config, quantized(tensors, packing))
    tokens = random_tokens(70, 101)
    (expected,) = Pages(load(rounded)).step((0, tokens, 0, 70))
    model = load(write_checkpoint(tmp_path / "whole", config, tensors), packing=packing)
    pages = Pages(model)
    logits = torch.cat(
        [
            pages.step((0, tokens, 0, 60))[0],
            *(pages.step((0, tokens, at, at + 1))[0] for at in range(60, 70)),
        ]
    )
    # activations keep 15 bits of each row's largest
    assert float((logits - expected).norm() / expected.norm()) < 2e-3
    (whole,) = Pages(load(tmp_path / "whole")).step((0, tokens, 0, 70))
    assert float((whole - expected).norm() / expected.norm()) > 5e-3  # it is quantized


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU multiplies no int8 exactly")
def test_int4_takes_what_fits_and_int8_the_rest_and_the_head(tmp_path: Path) -> None:
    others = set(map(id, linear_layers()))
    model = load(write_checkpoint(tmp_path, LLAMA_OF_64S), packing="int4")
    layers = [layer for layer in linear_layers() if id(layer) not in others]
    kinds = [type(layer.weight) for layer in layers if "lm_head" not in layer.parts]
    assert kinds and set(kinds) == {Int4Weight}
    assert isinstance(model.lm_head.weight, Int8Weight)  # type: ignore[attr-defined]


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU multiplies no int8 exactly")
@pytest.mark.parametrize("packing", ["dtype", "int8", "int4"])
@pytest.mark.parametrize("config", [LLAMA_OF_64S, LLAMA | {"tie_word_embeddings": True}])
def test_the_bytes_of_a_model_are_known_before_it_is_loaded(
    config: dict[str, object], packing: PackFormat, tmp_path: Path
) -> None:
    checkpoint = inspect_checkpoint(write_checkpoint(tmp_path, config))
    others = set(map(id, linear_layers()))
    model = build_model(checkpoint, Placement(CPU, torch.float32, packing=packing))
    layers = [layer for layer in linear_layers() if id(layer) not in others]
    known = weight_bytes(model) + bytes_added(model)
    unpacked = sum(
        layer.weight.nbytes for layer in layers if isinstance(layer.weight, torch.Tensor)
    )
    kept = weight_bytes(model) - unpacked  # without the head's, if that is the embedding
    kept += sum(layer.weight.nbytes for layer in layers if layer.is_shared)
    load_weights(checkpoint, model)
    packed = 0
    for layer in layers:
        for attribute in dataclasses.fields(layer.weight):  # type: ignore[arg-type]
            part = getattr(layer.weight, attribute.name)
            packed += part.numel() * part.itemsize if isinstance(part, torch.Tensor) else 0
    assert known == kept + packed


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU multiplies no int8 exactly")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_engine_answers_as_the_whole_one(quantization: str) -> None:
    """Most of the embedded model's answers, in less than two thirds of its bytes."""
    params = SamplingParams(temperature=0.0, max_tokens=60)
    answers, sizes = [], []
    for kind in ("none", quantization):
        engine = make_engine(TINY, dtype="bfloat16", quantization=kind)
        assert engine.tokenizer is not None
        prompts = [engine.tokenizer.encode_chat(chat).token_ids for chat in chats()[:12]]
        answers.append([answer.text for answer in engine.generate(prompts, params)])
        sizes.append(engine.info.weight_bytes)
        assert engine.info.quantization == kind
    assert sum(map(str.__eq__, *answers)) >= 10
    assert sizes[1] < 0.7 * sizes[0]


def test_where_int8_and_int4_cannot_run_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model="m", quantization="int8")
    with pytest.raises(ConfigError, match="--quantization int8 is for CPUs; on a GPU use fp8"):
        config.resolve_packing(torch.device("cuda"))
    monkeypatch.setattr("runtime.engine_config.multiplies_int8", lambda: False)
    with pytest.raises(ConfigError, match="--quantization int8 needs a CPU with VNNI"):
        config.resolve_packing(CPU)
    assert EngineConfig(model="m").resolve_packing(CPU) == "dtype"
    assert EngineConfig(model="m").resolve_packing(torch.device("cuda")) is None
