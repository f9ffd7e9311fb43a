"""Made checkpoints are what a release is: transformers and our engine read the same model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import make_checkpoint
from benchmarks.make_checkpoint import split, tensor_spec
from benchmarks.random_models import config_json
from runtime import Engine, EngineConfig, SamplingParams, Tokenizer, inspect_checkpoint

SHAPES = ["qwen2.5_0.5b", "r1_distill_llama_8b", "r1_0528_qwen3_8b", "moe_16b", "v2_lite", "v3"]
SHARD_BYTES = 60_000


def make(folder: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_checkpoint", *arguments[:1], str(folder), *arguments[1:]])
        assert make_checkpoint.main() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_reads_every_family(shape: str, tmp_path: Path) -> None:
    make(tmp_path, shape, "--tiny", "--shard-bytes", str(SHARD_BYTES))
    checkpoint = inspect_checkpoint(tmp_path)
    assert (checkpoint.fp8 is not None) == (shape == "v3")
    config = EngineConfig(model=str(tmp_path), device="cpu", max_model_len=64)
    engine = Engine.from_checkpoint(config)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    [answer] = engine.generate([[5, 6, 7]], params)
    assert len(answer.token_ids) == 4


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    make(tmp_path, "qwen2.5_0.5b", "--tiny", "--dtype", "float32")
    peer, about = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    prompt = [7, 100, 300, 9]
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    expected = peer.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    engine = Engine.from_checkpoint(
        EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", max_model_len=64)
    )
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    [answer] = engine.generate([prompt], params)
    assert answer.token_ids == expected


def test_shards_hold_each_tensor_once_and_the_index_knows_where(tmp_path: Path) -> None:
    make(tmp_path, "r1_distill_llama_8b", "--tiny", "--shard-bytes", str(SHARD_BYTES))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found: dict[str, Any] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            found |= {name: tensors.get_tensor(name) for name in names}
        assert {index["weight_map"][name] for name in names} == {file.name}
        assert len(names) == 1 or file.stat().st_size < SHARD_BYTES + 4096
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    # transformers' own parameters have the released names and shapes
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config)
    assert {n: p.shape for n, p in peer.named_parameters()} == {
        n: t.shape for n, t in found.items()
    }
    for name, tensor in found.items():
        values = tensor.float()
        assert tensor.dtype == torch.bfloat16
        assert abs(float(values.mean()) - name.endswith("norm.weight")) < 0.02, name
        assert 0.01 < float(values.std()) < 0.03, name


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make(tmp_path / name, "qwen2.5_0.5b", "--tiny", "--seed", seed)
    first, second, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert first == second != other


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    spec = {name: ((size,), torch.float32) for name, size in (("a", 2), ("b", 9), ("c", 1))}
    assert [list(shard) for shard in split(spec, 12)] == [["a"], ["b"], ["c"]]
    assert [list(shard) for shard in split(spec, 44)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("shape", "billions"), [("qwen2.5_0.5b", 0.494), ("r1_distill_qwen_1.5b", 1.777)]
)
def test_a_whole_shape_has_the_released_number_of_parameters(shape: str, billions: float) -> None:
    spec = tensor_spec(config_json(shape), torch.bfloat16)
    assert make_checkpoint.num_bytes(spec) / 2e9 == pytest.approx(billions, abs=5e-4)


def test_the_tokenizer_has_a_token_for_every_embedding(tmp_path: Path) -> None:
    config = config_json("qwen2.5_0.5b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_checkpoint.write_tokenizer(tmp_path, config)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.num_tokens == config["vocab_size"] == 151_936
    assert tokenizer.eos_token_ids == {151_643}
    text = "plain text, 中文"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == text
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(peer) == 151_936 and peer.encode(text) == ids


def test_wrong_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setattr(sys, "argv", ["x", "qwen2.5_0.5b", str(blocker / "sub"), "--tiny"])
    assert make_checkpoint.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        make_checkpoint.parse(["gpt-5", "folder"])
    with pytest.raises(SystemExit):
        make_checkpoint.parse(["v3", "folder", "--layers", "0"])
