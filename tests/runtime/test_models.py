"""Each family's logits against transformers, through pages, chunks and mixed batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.models.layers import Fp8Format
from runtime.weights import cache_bytes_per_token
from tests.runtime import checkpoints
from tests.runtime.checkpoints import (
    DEEPSEEK_V1,
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V3_FP8,
    DEEPSEEK_V32,
    DEEPSEEK_V32_FP8,
    FATHOM_TINY,
    LINEAR_ROPE,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    QWEN3,
    YARN_ROPE,
    Config,
    write_checkpoint,
)
from tests.runtime.pages import Pages, load, random_tokens, reference_logits

TOLERANCE = 1e-4

CASES: dict[str, Config] = {
    "llama": LLAMA,
    "llama mha, explicit head_dim": LLAMA | {"num_key_value_heads": 6, "head_dim": 12},
    "llama mqa, linear rope": LLAMA | {"num_key_value_heads": 1, "rope_scaling": LINEAR_ROPE},
    "llama llama3 rope": LLAMA | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama yarn rope": LLAMA | {"rope_scaling": YARN_ROPE | {"mscale": 0, "mscale_all_dim": 0}},
    "llama with every bias": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama tied head": LLAMA | {"tie_word_embeddings": True},
    "qwen2": QWEN2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3 without yarn": DEEPSEEK_V3 | {"rope_scaling": None},
    "deepseek_v3 mscale ratio": DEEPSEEK_V3 | {"rope_scaling": YARN_ROPE | {"mscale": 0.707}},
    "deepseek_v3 one group, raw weights": DEEPSEEK_V3
    | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "num_nextn_predict_layers": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Whole prompt, past the original context of every scaled rope (64)."""
    folder = write_checkpoint(tmp_path, CASES[name])
    tokens = random_tokens(150, 101)
    (logits,) = Pages(load(folder)).step((0, tokens, 0, len(tokens)))
    expected = reference_logits(folder, tokens)
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2", "deepseek_v3"])
def test_chunks_decodes_and_neighbours_do_not_change_a_row(name: str, tmp_path: Path) -> None:
    """Bit for bit: a prompt in chunks of any size, beside other sequences, as when run whole."""
    model = load(write_checkpoint(tmp_path, CASES[name]))
    first, second = random_tokens(43, 101), random_tokens(29, 101, seed=1)
    (whole_first,) = Pages(model).step((0, first, 0, 43))
    (whole_second,) = Pages(model).step((1, second, 0, 29))

    pages = Pages(model)
    pieces: dict[int, list[Tensor]] = {0: [], 1: []}
    plan = [
        [(0, first, 0, 8)],
        [(0, first, 8, 21)],
        [(0, first, 21, 22), (1, second, 0, 17)],
        [(1, second, 17, 18), (0, first, 22, 39)],
        [(0, first, 39, 40), (1, second, 18, 19)],
        [(1, second, 19, 29), (0, first, 40, 43)],
    ]
    for chunks in plan:
        for chunk, logits in zip(chunks, pages.step(*chunks), strict=True):
            pieces[chunk[0]].append(logits)
    assert torch.equal(torch.cat(pieces[0]), whole_first)
    assert torch.equal(torch.cat(pieces[1]), whole_second)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(tmp_path, CASES[name])
    tokens = random_tokens(40, 101)
    exact = reference_logits(folder, tokens)
    (logits,) = Pages(load(folder, torch.bfloat16), torch.bfloat16).step((0, tokens, 0, 40))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = reference.eval()(torch.tensor([tokens])).logits[0].float()
    ours_error = (logits - exact).abs().mean()
    assert ours_error <= 1.5 * (theirs - exact).abs().mean()


LAYOUTS = {
    **{name: CASES[name] for name in ("llama", "llama tied head", "qwen2", "deepseek_v3")},
    "qwen3": QWEN3,
    "deepseek_v1": DEEPSEEK_V1,
    "deepseek_v2_lite": DEEPSEEK_V2_LITE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v3 fp8": DEEPSEEK_V3_FP8,
    "deepseek_v32 fp8": DEEPSEEK_V32_FP8,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_is_a_target(name: str, tmp_path: Path) -> None:
    """Targets cover each parameter's storage exactly once, so nothing stays uninitialised."""
    fp8 = Fp8Format() if "fp8" in name else None
    model = load(write_checkpoint(tmp_path, LAYOUTS[name]), fp8=fp8)
    covered: dict[int, int] = {}
    for target in model.weight_targets().values():
        assert target.is_contiguous()
        storage = target.untyped_storage()
        covered[storage.data_ptr()] = covered.get(storage.data_ptr(), 0) + target.nbytes
    sizes = {
        target.untyped_storage().data_ptr(): target.untyped_storage().nbytes()
        for target in model.weight_targets().values()
    }
    assert covered == sizes


def test_mtp_weights_are_loaded_into_their_own_layer(tmp_path: Path) -> None:
    tensors = checkpoints.make_tensors(DEEPSEEK_V3)
    model = load(write_checkpoint(tmp_path, DEEPSEEK_V3, tensors))
    targets = model.weight_targets()
    mtp = [name for name in tensors if name.startswith("model.layers.3.")]
    assert len(mtp) > 40
    assert all(torch.equal(targets[name], tensors[name]) for name in mtp)


def test_router_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    tensors = checkpoints.make_tensors(DEEPSEEK_V3)
    model = load(write_checkpoint(tmp_path, DEEPSEEK_V3, tensors), torch.bfloat16)
    targets = model.weight_targets()
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        full_name = f"model.layers.1.mlp.{name}"
        assert torch.equal(targets[full_name], tensors[full_name])
    assert targets["lm_head.weight"].dtype == torch.bfloat16


def test_cache_bytes_per_token(tmp_path: Path) -> None:
    dense = load(write_checkpoint(tmp_path / "llama", LLAMA))
    latent = load(write_checkpoint(tmp_path / "v3", DEEPSEEK_V3))
    sparse = load(write_checkpoint(tmp_path / "v32", DEEPSEEK_V32))
    assert cache_bytes_per_token(sparse, torch.bfloat16) == 3 * (20 + 8 + 12) * 2
    assert cache_bytes_per_token(dense, torch.bfloat16) == 2 * 2 * (2 * 8) * 2
    assert cache_bytes_per_token(latent, torch.float32) == 3 * (20 + 8) * 4


def test_embedded_model_equals_transformers() -> None:
    tokens = random_tokens(200, 2000)
    (logits,) = Pages(load(FATHOM_TINY)).step((0, tokens, 0, len(tokens)))
    expected = reference_logits(FATHOM_TINY, tokens)
    assert (logits - expected).abs().max() <= TOLERANCE
