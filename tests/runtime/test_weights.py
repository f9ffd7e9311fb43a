"""Finding and loading: exact values, small memory. Damaged checkpoints are in `test_corpus`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.weights
from runtime.errors import CheckpointError
from runtime.models.layers import Placement
from runtime.weights import (
    build_model,
    find_checkpoint,
    inspect_checkpoint,
    is_hub_id,
    load_weights,
    pull,
)
from tests.runtime.checkpoints import (
    DEEPSEEK_V3,
    LLAMA,
    Config,
    Tensors,
    make_tensors,
    write_checkpoint,
)

CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> Tensors:
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, Placement(CPU, torch.float32))
    load_weights(checkpoint, model, **options)
    return model.weight_targets()


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK_V3])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_arrives_exactly(
    tmp_path: Path, config: Config, num_shards: int, dtype: torch.dtype
) -> None:
    tensors = make_tensors(config, dtype=dtype)
    folder = write_checkpoint(tmp_path / "ein Ordner 模型", config, tensors, num_shards=num_shards)
    loaded = load(folder)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name].float()) for name in tensors)


def test_small_chunks_give_the_same_values(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(runtime.weights, "MAX_BUFFER_BYTES", 72)
    tensors = make_tensors(LLAMA, dtype=torch.bfloat16)
    loaded = load(write_checkpoint(tmp_path, LLAMA, tensors))
    assert all(torch.equal(loaded[name], tensors[name].float()) for name in tensors)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    tensors = make_tensors(LLAMA)
    calls: list[tuple[int, int]] = []
    load(write_checkpoint(tmp_path, LLAMA, tensors), progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)


def test_checkpoint_facts(tmp_path: Path) -> None:
    tensors = make_tensors(LLAMA)
    checkpoint = inspect_checkpoint(write_checkpoint(tmp_path, LLAMA, tensors))
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint.eos_token_ids == (1,)


def peak_memory() -> int:
    """Highest resident bytes of this process since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_loading_takes_no_second_copy(tmp_path: Path) -> None:
    clear_refs = Path("/proc/self/clear_refs")
    if not os.access(clear_refs, os.W_OK):
        pytest.skip("peak memory can only be measured on Linux")
    folder = write_checkpoint(tmp_path, {**LLAMA, "vocab_size": 150_000})  # 58 MB
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, Placement(CPU, torch.float32))
    clear_refs.write_text("5")  # resets the peak to the present size
    before = peak_memory()
    load_weights(checkpoint, model)
    assert peak_memory() - before <= 1.15 * (folder / "model.safetensors").stat().st_size


def test_a_file_cut_after_the_check_is_reported(tmp_path: Path) -> None:
    checkpoint = inspect_checkpoint(write_checkpoint(tmp_path, LLAMA))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    model = build_model(checkpoint, Placement(CPU, torch.float32))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*: the file ends inside"):
        load_weights(checkpoint, model)


# -- finding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", True),
        ("a/b", True),
        ("./a/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("a", False),
        ("a/../b", False),
        ("a b/c", False),
        ("", False),
    ],
)
def test_hub_ids(model: str, is_one: bool) -> None:
    assert is_hub_id(model) is is_one


def test_finding_a_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", LLAMA)
    assert find_checkpoint(str(folder)) == folder
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(str(folder / "config.json"))
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint("\0")
    with pytest.raises(CheckpointError, match="home directory"):
        find_checkpoint("~no-such-user/model")


def fake_cache(home: Path, hub_id: str, folder: Path) -> None:
    """Lay ``folder`` out as the Hugging Face cache does."""
    repository = home / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "abc")


def test_hub_id_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = write_checkpoint(tmp_path / "x", LLAMA, num_shards=2)
    (folder / "tokenizer.json").write_text("{}")
    fake_cache(tmp_path / "hub", "someone/model", folder)
    found = find_checkpoint("someone/model")
    assert inspect_checkpoint(found).architecture == "LlamaForCausalLM"
    (found / "model-00001-of-000002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="fathom pull someone/model"):
        find_checkpoint("someone/model")


def test_a_hub_id_that_cannot_be_reached_names_the_command(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="`fathom pull someone/model`"):
        pull("someone/model")
    with pytest.raises(CheckpointError, match="not a hub id"):
        pull("model")
