"""Models with packed linear layers: the same numbers, the same promises, no second copy."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from kernels import packed_linear
from kernels.packed_linear import PackedWeight, packs
from runtime.models import CausalLM
from runtime.models.layers import Fp8Format, Linear, Placement
from runtime.weights import build_model, inspect_checkpoint, load_weights
from tests.runtime.checkpoints import DEEPSEEK_V3, LLAMA, write_checkpoint
from tests.runtime.pages import Pages, random_tokens
from tests.runtime.test_models import LAYOUTS, TOLERANCE

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not packs(torch.float32, CPU, 1 << 20), reason="this CPU or pass packs no weights"
)


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_linear.LEAST_VALUES, torch.float32, 0)


def load(folder: Path, *, pack: bool, fp8: Fp8Format | None = None) -> CausalLM:
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, Placement(CPU, torch.float32, fp8, pack=pack))
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
    (expected,) = Pages(load(folder, pack=False, fp8=fp8)).step((0, tokens, 0, 70))
    others = set(map(id, linear_layers()))
    model = load(folder, pack=True, fp8=fp8)
    layers = [layer for layer in linear_layers() if id(layer) not in others]
    packed = [isinstance(layer.weight, PackedWeight) for layer in layers if layer.may_pack]
    assert packed and all(packed)
    (logits,) = Pages(model).step((0, tokens, 0, 70))
    assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK_V3], ids=["llama", "deepseek_v3"])
def test_packed_rows_have_the_same_bits_in_chunks_and_beside_others(
    config: dict[str, object], tmp_path: Path
) -> None:
    model = load(write_checkpoint(tmp_path, config), pack=True)
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
    model = build_model(checkpoint, Placement(CPU, torch.float32, pack=True))
    layers = [layer for layer in linear_layers() if isinstance(layer.weight, torch.Tensor)]
    weights = [weakref.ref(layer.weight) for layer in layers if layer.may_pack]
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
    model = load(folder, pack=True)
    targets = load(folder, pack=False).weight_targets()
    head, embedding = model.lm_head, model.embed_tokens  # type: ignore[attr-defined]
    assert isinstance(head.weight, PackedWeight)
    assert torch.equal(embedding, targets["model.embed_tokens.weight"])
