"""Folders that look wrong and are not, and folders full of code that must never run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.runtime.checkpoints import (
    DEEPSEEK_V31_FP8,
    DEEPSEEK_V32_FP8,
    make_tensors,
    write_checkpoint,
)
from tests.runtime.corpus.case import (
    CONFIG,
    DOWN,
    GENERATION_CONFIG,
    NUM_TOKENS,
    SERVED,
    SERVED_FP8,
    SERVED_V3,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Case,
    edit_json,
    edit_tensors,
    in_sequence,
    nothing,
    remove,
    set_config,
    set_tensor,
    valid_tensors,
)
from tests.runtime.corpus.fp8 import KV_B, KV_B_SCALES, SCALES
from tests.runtime.corpus.layouts import INDEX, sharded
from tests.runtime.corpus.parts import SERVED_V32
from tests.runtime.corpus.prompts import set_template, split_by

CODE = "code to run"
NORM = "model.norm.weight"
MARKER = "executed"
"""What planted code writes beside the folder."""


def flip_a_bit(folder: Path) -> None:
    """The lowest bit of the last weight in the file."""
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


def extra_metadata(folder: Path) -> None:
    save_file(valid_tensors(SERVED), folder / WEIGHTS, metadata={"format": "np", "x\n": "…" * 999})


def linked_files(folder: Path) -> None:
    """As the Hugging Face cache lays a checkpoint out."""
    blobs = folder.parent / "blobs"
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))


def scales_in_another_file(folder: Path) -> None:
    tensors = valid_tensors(SERVED_FP8)
    (folder / WEIGHTS).unlink()
    parts = {"a": lambda name: name.endswith("_inv"), "b": lambda name: not name.endswith("_inv")}
    for file, belongs in parts.items():
        part = {name: tensor for name, tensor in tensors.items() if belongs(name)}
        save_file(part, folder / f"{file}.safetensors")


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def plant_code(folder: Path) -> None:
    """Python under every name that something might import, pickles, a hostile chat template."""
    marker = folder.parent / MARKER
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    modules = "configuration_deepseek modeling_deepseek tokenization_deepseek __init__ __main__ "
    modules += "conftest sitecustomize usercustomize setup api runtime kernels torch triton json "
    modules += "tokenizers safetensors jinja2 huggingface_hub typer rich uvicorn"
    for module in modules.split():
        (folder / f"{module}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.model"):
        (folder / name).write_bytes(pickle.dumps(_Bomb(marker)))
    auto_map = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        "AutoTokenizer": ["tokenization_deepseek.Tokenizer", None],
    }
    set_config(auto_map=auto_map, trust_remote_code=True)(folder)
    edit_json(TOKENIZER_CONFIG, lambda config: config.update(auto_map=auto_map))(folder)
    set_template(
        "{% set run = cycler.__init__.__globals__.os.system %}{{ run('touch "
        + str(marker)
        + "') }}"
    )(folder)


def tied(folder: Path) -> None:
    set_config(tie_word_embeddings=True)(folder)
    tensors = valid_tensors(SERVED)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS)


def without_eos(folder: Path) -> None:
    set_config(eos_token_id=None)(folder)
    remove(GENERATION_CONFIG)(folder)
    edit_json(TOKENIZER_CONFIG, lambda config: config.pop("eos_token"))(folder)


def junk(folder: Path) -> None:
    """What people and their systems leave in a folder."""
    for name in (".DS_Store", ".gitattributes", "README.md", "model.onnx", "consolidated.pth"):
        (folder / name).write_bytes(b"\0" * 100)
    (folder / "figures").mkdir()
    (folder / "dangling").symlink_to("nowhere")


def _of_tokens(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"vocab_size": NUM_TOKENS}


ODDITIES: dict[str, Case] = {
    "nothing wrong": Case(nothing),
    "nothing wrong in V3": Case(nothing, config=SERVED_V3),
    "nothing wrong in V3.2": Case(nothing, config=SERVED_V32),
    "nothing wrong in FP8": Case(nothing, config=SERVED_FP8),
    "nothing wrong in FP8 of V3.1": Case(nothing, config=_of_tokens(DEEPSEEK_V31_FP8)),
    "nothing wrong in FP8 of V3.2": Case(nothing, config=_of_tokens(DEEPSEEK_V32_FP8)),
    "files of no concern": Case(junk),
    "weights of a name with spaces": Case(
        lambda folder: (folder / WEIGHTS).rename(folder / "les poids 权重.safetensors")
    ),
    "extra metadata": Case(extra_metadata),
    "one bit of a weight flipped": Case(flip_a_bit),
    "large finite weights": Case(set_tensor(DOWN, lambda w: w.fill_(3e38))),
    "a matrix of zeros": Case(set_tensor(DOWN, lambda w: w.zero_())),
    "a matrix in BF16, a norm in F16": Case(
        edit_tensors(lambda t: t.update({DOWN: t[DOWN].bfloat16(), NORM: t[NORM].half()}))
    ),
    "MTP declared": Case(nothing, config=SERVED_V3),
    "MTP declared, not there": Case(
        lambda folder: save_file(
            make_tensors(SERVED_V3 | {"num_nextn_predict_layers": 0}), folder / WEIGHTS
        ),
        config=SERVED_V3,
    ),
    "MTP there, not declared": Case(set_config(num_nextn_predict_layers=0), config=SERVED_V3),
    "tied head": Case(tied),
    "tied head stored all the same": Case(set_config(tie_word_embeddings=True)),
    "rotary buffers of old releases": Case(
        edit_tensors(
            lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
        )
    ),
    "shards": Case(sharded),
    "shards without an index": Case(in_sequence(sharded, remove(INDEX))),
    "index without metadata": Case(
        in_sequence(sharded, edit_json(INDEX, lambda index: index.pop("metadata")))
    ),
    "files of the Hugging Face cache": Case(linked_files),
    "config with a BOM, unknown keys": Case(
        lambda folder: (folder / CONFIG).write_bytes(
            b"\xef\xbb\xbf" + json.dumps(SERVED | {"future": {"key": [1]}}).encode()
        )
    ),
    "config in UTF-16": Case(
        lambda folder: (folder / CONFIG).write_bytes(json.dumps(SERVED).encode("utf-16"))
    ),
    "config that says a key twice": Case(
        lambda folder: (folder / CONFIG).write_text('{"vocab_size": 7, ' + json.dumps(SERVED)[1:])
    ),
    "no torch_dtype": Case(set_config(torch_dtype=None)),
    "the new spelling of dtype": Case(set_config(torch_dtype=None, dtype="float16")),
    "context of four million": Case(set_config(max_position_embeddings=1 << 22)),
    "more embeddings than tokens": Case(
        lambda folder: write_checkpoint(folder, SERVED | {"vocab_size": NUM_TOKENS + 64})
    ),
    "no eos": Case(without_eos),
    "no chat template": Case(
        edit_json(TOKENIZER_CONFIG, lambda config: config.pop("chat_template"))
    ),
    "chat template that builds a gigabyte": Case(
        set_template("{{ '%1000000000d' % 1 }}{{ 'x' | center(1000000000) }}")
    ),
    "tokenizer with a regular expression that never ends": Case(split_by("(x+x+)+y")),
    "no generation_config": Case(remove(GENERATION_CONFIG)),
    "no tokenizer_config": Case(remove(TOKENIZER_CONFIG)),
    "FP8 with scales in BF16": Case(
        set_tensor(SCALES, lambda s: s.bfloat16(), SERVED_FP8), config=SERVED_FP8
    ),
    "FP8 with scales in another file": Case(scales_in_another_file, config=SERVED_FP8),
    "FP8 whose kv_b_proj is not": Case(
        edit_tensors(
            lambda t: (t.pop(KV_B_SCALES), t.update({KV_B: t[KV_B].bfloat16()})), SERVED_FP8
        ),
        config=SERVED_FP8,
    ),
    CODE: Case(plant_code),
}
