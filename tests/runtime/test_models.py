"""Each family's logits against transformers, through pages, chunks and mixed batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.batch import PagedBatch
from runtime.config import Fields
from runtime.models import FAMILIES, CausalLM
from runtime.weights import build_model, cache_bytes_per_token, inspect_checkpoint, load_weights
from tests.runtime import checkpoints
from tests.runtime.checkpoints import (
    DEEPSEEK_V3,
    FATHOM_TINY,
    LINEAR_ROPE,
    LLAMA,
    LLAMA3_ROPE,
    QWEN2,
    YARN_ROPE,
    Config,
    write_checkpoint,
)

PAGE_SIZE = 8
NUM_PAGES = 64
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


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, device=torch.device("cpu"), dtype=dtype)
    load_weights(checkpoint, model)
    return model


class Pages:
    """Caches full of NaN and, per sequence, pages in no order; runs steps of chunks on a model."""

    def __init__(self, model: CausalLM, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.caches = [
            {
                name: torch.full((NUM_PAGES, PAGE_SIZE, *shape), math.nan, dtype=dtype)
                for name, shape in layer.items()
            }
            for layer in model.cache_spec()
        ]
        generator = torch.Generator().manual_seed(1)
        self.free = torch.randperm(NUM_PAGES, generator=generator).tolist()
        self.tables: dict[int, list[int]] = {}

    def step(self, *chunks: tuple[int, list[int], int, int]) -> list[Tensor]:
        """Chunks are (sequence, its tokens, start, end), single tokens first; logits of each."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for seq_id, tokens, start, end in chunks:
            table = self.tables.setdefault(seq_id, [])
            while len(table) * PAGE_SIZE < end:
                table.append(self.free.pop())
            ids += tokens[start:end]
            positions += range(start, end)
            slots += [table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
        lens = [end - start for _, _, start, end in chunks]
        context_lens = [end for _, _, _, end in chunks]
        width = -(-max(context_lens) // PAGE_SIZE)
        tables = [(self.tables[chunk[0]] + [0] * width)[:width] for chunk in chunks]
        batch = PagedBatch(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            block_table=torch.tensor(tables, dtype=torch.int32),
            num_decodes=sum(1 for length in lens if length == 1),
            max_query_len=max(lens),
            max_context_len=max(context_lens),
        )
        with torch.inference_mode():
            hidden = self.model.forward(torch.tensor(ids), batch, self.caches)
            return list(self.model.logits(hidden).split(lens))


def reference_logits(folder: Path, tokens: list[int]) -> Tensor:
    """[num_tokens, vocab] of transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0]


def random_tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


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


@pytest.mark.parametrize("name", ["llama", "llama tied head", "qwen2", "deepseek_v3"])
def test_every_parameter_is_a_target(name: str, tmp_path: Path) -> None:
    """Targets cover each parameter's storage exactly once, so nothing stays uninitialised."""
    model = load(write_checkpoint(tmp_path, CASES[name]))
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


REAL_LLAMA = LLAMA | {"hidden_size": 4096, "num_hidden_layers": 30, "vocab_size": 102400}
REAL_SHAPES: dict[str, tuple[Config, int]] = {
    "deepseek-llm-7b": (
        REAL_LLAMA
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008},
        6_910_365_696,
    ),
    "R1-Distill-Qwen-7B": (
        QWEN2
        | {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "DeepSeek-V3 without MTP": (
        DEEPSEEK_V3
        | {
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "vocab_size": 129280,
        },
        671_026_419_200,
    ),
}


@pytest.mark.parametrize("name", REAL_SHAPES)
def test_real_shapes_build_without_memory(name: str) -> None:
    """The published parameter counts, on the meta device."""
    config, num_parameters = REAL_SHAPES[name]
    family = FAMILIES[config["architectures"][0]]
    model = family.build(
        family.parse_config(Fields(config, "config.json"), ()),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        max_model_len=1,
    )
    assert sum(target.numel() for target in model.weight_targets().values()) == num_parameters


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
    assert cache_bytes_per_token(dense, torch.bfloat16) == 2 * 2 * (2 * 8) * 2
    assert cache_bytes_per_token(latent, torch.float32) == 3 * (20 + 8) * 4


def test_embedded_model_equals_transformers() -> None:
    tokens = random_tokens(200, 2000)
    (logits,) = Pages(load(FATHOM_TINY)).step((0, tokens, 0, len(tokens)))
    expected = reference_logits(FATHOM_TINY, tokens)
    assert (logits - expected).abs().max() <= TOLERANCE
