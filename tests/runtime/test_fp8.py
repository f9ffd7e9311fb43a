"""FP8 checkpoints and FP8 at load: the numbers of the weights multiplied out, in a byte each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime import ConfigError, EngineConfig, SamplingParams
from runtime.config import Fp8Checkpoint
from runtime.models.layers import Fp8Format
from tests.runtime.checkpoints import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_FP8,
    DEEPSEEK_V31_FP8,
    DEEPSEEK_V32_FP8,
    FP8,
    FP8_SIZES,
    LLAMA,
    dequantized,
    make_tensors,
    write_checkpoint,
)
from tests.runtime.engines import TINY, chats, make_engine
from tests.runtime.pages import Pages, load, random_tokens

CPU = torch.device("cpu")
WIDE_LLAMA = LLAMA | {"hidden_size": 192, "intermediate_size": 200, "head_dim": 24}
W8A16 = Fp8Format()


def logits_of(folder: Path, fp8: Fp8Format | None, dtype: torch.dtype = torch.float32) -> Tensor:
    tokens = random_tokens(40, 101)
    [logits] = Pages(load(folder, dtype, fp8=fp8), dtype).step((0, tokens, 0, 40))
    return logits


@pytest.mark.parametrize("config", [DEEPSEEK_V3_FP8, DEEPSEEK_V31_FP8, DEEPSEEK_V32_FP8])
def test_logits_equal_those_of_the_weights_multiplied_out(config: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    tensors = make_tensors(config)
    stored = write_checkpoint(tmp_path / "fp8", config, tensors)
    plain = write_checkpoint(tmp_path / "plain", *dequantized(config, tensors))
    expected = logits_of(plain, None)
    assert (logits_of(stored, W8A16) - expected).abs().max() <= 1e-3
    assert (logits_of(stored, None) - expected).abs().max() <= 1e-3  # decoded while loading


def test_matrices_stay_in_one_byte_and_keep_the_files_bits(tmp_path: Path) -> None:
    tensors = make_tensors(DEEPSEEK_V3_FP8)
    model = load(write_checkpoint(tmp_path, DEEPSEEK_V3_FP8, tensors), fp8=W8A16)
    targets = model.weight_targets()
    matrices = [name for name in tensors if f"{name}_scale_inv" in tensors]
    assert len(matrices) > 100
    for name in matrices:
        if "kv_b_proj" in name:  # absorbed attention multiplies by parts of it
            assert targets[name].dtype == torch.float32
        else:
            assert torch.equal(targets[name].view(torch.uint8), tensors[name].view(torch.uint8))
            assert torch.equal(targets[f"{name}_scale_inv"], tensors[f"{name}_scale_inv"])


def test_router_head_and_embeddings_are_not_quantized(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, DEEPSEEK_V3 | FP8_SIZES), fp8=W8A16)
    quantized = {
        name
        for name, target in model.weight_targets().items()
        if target.dtype == torch.float8_e4m3fn
    }
    kept = ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj", "norm", "shared_head")
    assert not any(part in name for name in quantized for part in kept)
    assert "model.layers.0.mlp.gate_proj.weight" in quantized
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in quantized  # the MTP layer's


@pytest.mark.parametrize("config", [DEEPSEEK_V3 | FP8_SIZES, WIDE_LLAMA])
def test_quantizing_at_load_gives_the_checkpoint_that_stores_fp8(
    config: dict,  # type: ignore[type-arg]
    tmp_path: Path,
) -> None:
    """A bf16 checkpoint with --quantization fp8, and the same one quantized by other code."""
    plain = write_checkpoint(tmp_path / "bf16", config)
    if "kv_lora_rank" in config:  # whose kv_b_proj stays as it was
        tensors = make_tensors(config | {"quantization_config": FP8})
        original = make_tensors(config)
        for name in [name for name in tensors if "kv_b_proj.weight" in name]:
            tensors.pop(f"{name}_scale_inv", None)
            if name in original:
                tensors[name] = original[name]
    else:
        tensors = make_tensors(config | {"quantization_config": FP8})
    stored = write_checkpoint(tmp_path / "fp8", config | {"quantization_config": FP8}, tensors)
    assert torch.equal(logits_of(plain, W8A16), logits_of(stored, W8A16))
    assert not torch.equal(logits_of(plain, W8A16), logits_of(plain, None))


def test_quantized_activations_are_those_of_the_release(tmp_path: Path) -> None:
    """W8A8 of a dense model against transformers with every linear layer's input quantized."""
    from transformers import AutoModelForCausalLM

    tensors = make_tensors(WIDE_LLAMA | {"quantization_config": FP8})
    config = WIDE_LLAMA | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}
    stored = write_checkpoint(tmp_path / "fp8", config, tensors)
    plain = write_checkpoint(tmp_path / "plain", *dequantized(config, tensors))

    def quantize_input(module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        [x] = arguments
        groups = list(x.split(128, dim=-1))
        for i, group in enumerate(groups):
            scale = group.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / 448
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
            groups[i] = (group / scale).to(torch.float8_e4m3fn).float() * scale
        return (torch.cat(groups, dim=-1),)

    oracle = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(quantize_input)
    tokens = random_tokens(40, 101)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    # a value on the edge between two fp8 numbers may round either way: few do, the rest agrees
    difference = (logits_of(stored, Fp8Format("ue8m0")) - expected).abs()
    assert difference.median() <= 1e-5
    assert difference.max() <= 0.2
    assert (logits_of(stored, W8A16) - expected).abs().median() > 1e-3


def test_engine_runs_fp8_and_its_neighbours_do_not_matter() -> None:
    engine = make_engine(TINY, quantization="fp8")
    assert engine.info.quantization == "fp8 (W8A16)"
    plain = make_engine(TINY).info.weight_bytes
    assert engine.info.weight_bytes < 0.65 * plain  # embeddings and heads stay as they are
    assert engine.tokenizer is not None
    prompts = [engine.tokenizer.encode_chat(chat).token_ids for chat in chats()[:6]]
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    together = [completion.text for completion in engine.generate(prompts, greedy)]
    assert [engine.generate([prompt], greedy)[0].text for prompt in prompts] == together
    assert "Hello" in together[0]


def test_flags_decide_the_format() -> None:
    stored = Fp8Checkpoint("ue8m0")

    def resolve(checkpoint: Fp8Checkpoint | None, **flags: str) -> Fp8Format | None:
        return EngineConfig(model="m", **flags).resolve_fp8(CPU, checkpoint)  # type: ignore[arg-type]

    assert resolve(None) is None
    assert resolve(stored) == Fp8Format(None)  # a CPU has no fp8 matrix units
    assert resolve(stored, quantization="none") is None
    assert resolve(None, quantization="fp8") == Fp8Format(None)
    assert resolve(stored, fp8_activations="on") == Fp8Format("ue8m0")
    assert resolve(None, quantization="fp8", fp8_activations="on") == Fp8Format("float32")
    with pytest.raises(ConfigError, match="--fp8-activations on needs FP8 weights"):
        resolve(None, fp8_activations="on")
    allowed = "auto, none, fp8, int8, int4"
    with pytest.raises(ConfigError, match=f"--quantization 'int3' is not one of {allowed}"):
        EngineConfig(model="m", quantization="int3")


MEASURE = """
import json, sys, torch
from pathlib import Path
from runtime.models.layers import Fp8Format, Placement
from runtime.weights import build_model, inspect_checkpoint, load_weights, weight_bytes

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
placement = Placement(torch.device("cpu"), torch.bfloat16, Fp8Format())
warm = inspect_checkpoint(Path(sys.argv[2]))  # first calls allocate for good
load_weights(warm, build_model(warm, placement))
checkpoint = inspect_checkpoint(Path(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = build_model(checkpoint, placement)
load_weights(checkpoint, model)
print(json.dumps([status("VmHWM") - before, weight_bytes(model)]))
"""


def test_loading_takes_little_more_memory_than_the_checkpoint(tmp_path: Path) -> None:
    """Peak resident memory of a fresh process, above what it had before, against the file."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 24}
    config = DEEPSEEK_V3_FP8 | sizes | {"torch_dtype": "bfloat16"}
    tensors = {
        name: tensor.bfloat16()
        if tensor.dtype == torch.float32 and tensor.dim() == 2 and not name.endswith("scale_inv")
        else tensor
        for name, tensor in make_tensors(config).items()
    }
    big = write_checkpoint(tmp_path / "big", config, tensors)
    small = write_checkpoint(tmp_path / "small", DEEPSEEK_V3_FP8)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big), str(small)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    peak, parameters = json.loads(output)
    size = (big / "model.safetensors").stat().st_size
    print(
        f"file {size / 1e6:.1f} MB, peak {peak / size:.3f} x, parameters {parameters / size:.3f} x"
    )
    assert size > 100e6
    assert peak <= 1.15 * size
