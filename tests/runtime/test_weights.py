"""Loading: exact values, small memory, and one clear line for every damaged checkpoint."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import runtime.weights
from runtime.errors import CheckpointError
from runtime.shards import INDEX_NAME
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
DOWN = "model.layers.0.mlp.down_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Tensors:
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, device=CPU, dtype=dtype)
    load_weights(checkpoint, model, **options)
    return model.weight_targets()


def refusal(folder: Path) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    assert str(folder) in message
    return message


# -- what must load ------------------------------------------------------------------------------


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
    monkeypatch.setattr(runtime.weights, "CHUNK_BYTES", 72)
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


def test_dtype_falls_back_to_the_stored_one(tmp_path: Path) -> None:
    tensors = make_tensors(LLAMA, dtype=torch.float16)
    folder = write_checkpoint(tmp_path, {**LLAMA, "torch_dtype": None}, tensors)
    assert inspect_checkpoint(folder).dtype == torch.float16


def test_harmless_extras_are_accepted(tmp_path: Path) -> None:
    """Rotary buffers of old releases, a stored copy of a tied head, metadata, undeclared MTP."""
    tied = {**LLAMA, "tie_word_embeddings": True}
    tensors = make_tensors(LLAMA)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert "lm_head.weight" not in load(write_checkpoint(tmp_path / "tied", tied, tensors))
    undeclared = {**DEEPSEEK_V3, "num_nextn_predict_layers": 0}
    folder = write_checkpoint(tmp_path / "v3", undeclared, make_tensors(DEEPSEEK_V3))
    assert not any(name.startswith("model.layers.3.") for name in load(folder))


def test_declared_mtp_may_be_left_out(tmp_path: Path) -> None:
    without = make_tensors({**DEEPSEEK_V3, "num_nextn_predict_layers": 0})
    assert load(write_checkpoint(tmp_path, DEEPSEEK_V3, without)).keys() == without.keys()


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, LLAMA, num_shards=2)
    (folder / INDEX_NAME).unlink()
    assert load(folder).keys() == make_tensors(LLAMA).keys()


def test_symlinked_files_are_read(tmp_path: Path) -> None:
    """The Hugging Face cache is made of links."""
    folder = write_checkpoint(tmp_path / "blobs", LLAMA, num_shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert load(tmp_path / "snapshot").keys() == make_tensors(LLAMA).keys()


def peak_memory() -> int:
    """Highest resident bytes of this process since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_loading_takes_no_second_copy(tmp_path: Path, monkeypatch: Any) -> None:
    clear_refs = Path("/proc/self/clear_refs")
    if not os.access(clear_refs, os.W_OK):
        pytest.skip("peak memory can only be measured on Linux")
    monkeypatch.setattr(runtime.weights, "CHUNK_BYTES", 1 << 20)
    folder = write_checkpoint(tmp_path, {**LLAMA, "vocab_size": 150_000})  # 58 MB
    checkpoint = inspect_checkpoint(folder)
    model = build_model(checkpoint, device=CPU, dtype=torch.float32)
    clear_refs.write_text("5")  # resets the peak to the present size
    before = peak_memory()
    load_weights(checkpoint, model)
    assert peak_memory() - before <= 1.15 * (folder / "model.safetensors").stat().st_size


# -- directories that must not load --------------------------------------------------------------

Damage = Callable[[Path], object]


def edit_config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def edit_tensors(edit: Callable[[Tensors], object], config: Config = LLAMA) -> Damage:
    def damage(folder: Path) -> None:
        tensors = make_tensors(config)
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def edit_index(edit: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        write_checkpoint(folder, LLAMA, num_shards=2)
        (folder / "model.safetensors").unlink()
        path = folder / INDEX_NAME
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def duplicate_shard(folder: Path) -> None:
    write_checkpoint(folder, LLAMA)
    save_file({DOWN: make_tensors(LLAMA)[DOWN]}, folder / "more.safetensors")


def symlink_loop(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to(path)


def set_value(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


DIRECTORIES: dict[str, tuple[Damage, list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json: No such file"]),
    "unknown architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        ["architectures", "GPT2LMHeadModel", "DeepseekV3ForCausalLM"],
    ),
    "no architecture": (edit_config(architectures=None), ["architectures: missing"]),
    "architectures of junk": (edit_config(architectures=[[]]), ["architectures", "not one of"]),
    "vocab_size": (edit_config(vocab_size=102), ["model.embed_tokens.weight", "[101, 48]", "[102"]),
    "fewer layers": (edit_config(num_hidden_layers=1), ["model.layers.1.", "does not have"]),
    "more layers": (edit_config(num_hidden_layers=3), ["model.layers.2.", "missing"]),
    "torch_dtype": (edit_config(torch_dtype="float8"), ["torch_dtype", "float8", "bfloat16"]),
    "eos": (edit_config(eos_token_id=101), ["eos_token_id", "101"]),
    "fp8": (
        edit_config(quantization_config={"quant_method": "fp8"}),
        ["FP8 checkpoints are not supported by this version"],
    ),
    "gptq": (edit_config(quantization_config={"quant_method": "gptq"}), ["'gptq'-quantized"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no *.safetensors file"]),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["no *.safetensors file", "never read"],
    ),
    "symlink loop": (symlink_loop, ["model.safetensors", "symbolic links"]),
    "missing tensor": (edit_tensors(lambda t: t.pop(DOWN)), [DOWN, "1 of 21 tensors missing"]),
    "tied head declared untied": (
        edit_tensors(lambda t: t.pop("lm_head.weight")),
        ["lm_head.weight", "missing"],
    ),
    "extra tensors": (
        edit_tensors(lambda t: t.update({f"x{i}": torch.ones(1) for i in range(9)})),
        ["x0", "x4", "…", "9 tensors this model does not have"],
    ),
    "hostile name": (
        edit_tensors(lambda t: t.update({"../../x\n": torch.ones(1)})),
        ["../../x", "does not have"],
    ),
    "long name": (edit_tensors(lambda t: t.update({"n" * 10**6: torch.ones(1)})), ["name longer"]),
    "transposed": (
        edit_tensors(lambda t: t.update({DOWN: torch.ones(80, 48)})),
        [DOWN, "[80, 48]"],
    ),
    "zero size": (edit_tensors(lambda t: t.update({DOWN: torch.ones(0, 80)})), [DOWN, "[0, 80]"]),
    "integers": (
        edit_tensors(lambda t: t.update({DOWN: t[DOWN].view(torch.int32)})),
        [DOWN, "dtype I32", "BF16"],
    ),
    "doubles": (edit_tensors(lambda t: t.update({DOWN: t[DOWN].double()})), [DOWN, "dtype F64"]),
    "fp8 tensor": (
        edit_tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})),
        [DOWN, "FP8 checkpoints are not supported by this version"],
    ),
    "NaN": (edit_tensors(set_value(DOWN, float("nan"))), [DOWN, "holds NaN"]),
    "infinity": (edit_tensors(set_value(DOWN, float("-inf"))), [DOWN, "holds an infinity"]),
    "too many tensors": (
        edit_tensors(lambda t: t.update({f"x{i}": torch.ones(1) for i in range(20_000)})),
        ["20021 tensors", "at most 20000"],
    ),
    "same tensor in two shards": (duplicate_shard, [DOWN, "as well"]),
    "index names a missing file": (
        edit_index(lambda m: m.update({DOWN: "model-00009-of-000009.safetensors"})),
        ["model-00009-of-000009.safetensors", "not in the folder"],
    ),
    "index leaves a folder": (edit_index(lambda m: m.update({DOWN: "../x.safetensors"})), ["../x"]),
    "index of numbers": (
        edit_index(lambda m: m.update({DOWN: 3})),
        ["weight_map", "not a file name"],
    ),
    "index names a tensor not there": (
        edit_index(lambda m: m.update({"ghost": m[DOWN]})),
        ["ghost", "not in the file"],
    ),
    "index leaves a tensor out": (edit_index(lambda m: m.pop(DOWN)), [DOWN, "does not place it"]),
    "index is empty": (edit_index(lambda m: m.clear()), ["weight_map"]),
    "file not in the index": (
        lambda f: (edit_index(lambda m: None)(f), save_file({}, f / "stray.safetensors")),
        ["stray.safetensors", "not named in"],
    ),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_damaged_directory_is_one_line(tmp_path: Path, name: str) -> None:
    damage, expected = DIRECTORIES[name]
    folder = write_checkpoint(tmp_path, LLAMA)
    damage(folder)
    message = refusal(folder)
    for part in expected:
        assert part in message


# -- files that must not load --------------------------------------------------------------------


def safetensors_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one_tensor(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return safetensors_bytes(json.dumps({"x": entry}).encode(), b"\0" * 8)


def two_tensors(first: list[int], second: list[int], size: int) -> bytes:
    entries = {
        "x": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
        "y": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
    }
    return safetensors_bytes(json.dumps(entries).encode(), b"\0" * size)


FILES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of length 0": safetensors_bytes(b""),
    "header past the end": safetensors_bytes(b"{}", length=50),
    "header of 2^63": safetensors_bytes(b"{}", length=2**63),
    "header of 2^64-1": safetensors_bytes(b"{}", length=2**64 - 1),
    "header above 100 MB": safetensors_bytes(b"{}", length=100_000_001),
    "not JSON": safetensors_bytes(b"{nope"),
    "bad UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "deep nesting": safetensors_bytes(b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "not an object": safetensors_bytes(b"[]"),
    "duplicate key": safetensors_bytes(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "truncated": one_tensor()[:-1],
    "trailing garbage": one_tensor() + b"\0",
    "overlap": two_tensors([0, 4], [2, 6], 6),
    "hole": two_tensors([0, 4], [6, 8], 8),
    "end before begin": one_tensor(data_offsets=[8, 0]),
    "past the end": one_tensor(data_offsets=[0, 16], shape=[4]),
    "negative offset": one_tensor(data_offsets=[-8, 0]),
    "shape and size differ": one_tensor(shape=[3]),
    "shape overflows": one_tensor(shape=[2**62, 2**62]),
    "negative dimension": one_tensor(shape=[-2]),
    "fractional dimension": one_tensor(shape=[2.0]),
    "unknown dtype": one_tensor(dtype="F31"),
    "missing key": safetensors_bytes(b'{"x":{"dtype":"F32","shape":[0]}}'),
    "bad metadata": safetensors_bytes(b'{"__metadata__":{"a":1}}'),
    "pickle": b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "HTML page": b"<!DOCTYPE html><html><body>Not found</body></html>",
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, LLAMA)
    (folder / "model.safetensors").write_bytes(FILES[name])
    assert "model.safetensors: " in refusal(folder)


def test_a_file_cut_after_the_check_is_reported(tmp_path: Path) -> None:
    checkpoint = inspect_checkpoint(write_checkpoint(tmp_path, LLAMA))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    model = build_model(checkpoint, device=CPU, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*: the file ends inside"):
        load_weights(checkpoint, model)


def test_a_read_error_in_the_middle_is_reported(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = inspect_checkpoint(write_checkpoint(tmp_path, LLAMA))
    model = build_model(checkpoint, device=CPU, dtype=torch.float32)
    read = runtime.weights._read_exactly
    num_reads = 0

    def failing_read(*arguments: Any) -> None:
        nonlocal num_reads
        num_reads += 1
        if num_reads == 5:
            raise OSError(5, "Input/output error")
        read(*arguments)

    monkeypatch.setattr(runtime.weights, "_read_exactly", failing_read)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*: Input/output error"):
        load_weights(checkpoint, model)


def test_a_value_too_large_for_float16(tmp_path: Path) -> None:
    tensors = make_tensors(LLAMA)
    tensors[DOWN][0, 0] = 1e6
    folder = write_checkpoint(tmp_path, LLAMA, tensors)
    assert load(folder, torch.bfloat16)[DOWN][0, 0] > 9e5
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder, torch.float16)


def test_large_finite_values_are_no_infinity(tmp_path: Path) -> None:
    tensors = make_tensors(LLAMA)
    tensors[DOWN].fill_(3e38)
    assert load(write_checkpoint(tmp_path, LLAMA, tensors))[DOWN].isfinite().all()


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
