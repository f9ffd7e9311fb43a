"""Damaged config.json and generation_config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.runtime.checkpoints import YARN_ROPE
from tests.runtime.corpus.case import (
    CONFIG,
    GENERATION_CONFIG,
    NUM_TOKENS,
    SERVED,
    SERVED_V3,
    WEIGHTS,
    Case,
    edit_json,
    link_to,
    link_to_itself,
    of_config,
    remove,
    replaced_by,
    set_config,
    write,
)


def _config(*says: str, **values: Any) -> Case:
    """The first key is the one that is named."""
    return Case(set_config(**values), CONFIG, (f"{next(iter(values))}: ", *says))


def _yarn(key: str, value: object, *says: str) -> Case:
    rope = YARN_ROPE | {key: value}
    return Case(set_config(rope_scaling=rope), CONFIG, (f"rope_scaling: {key}: ", *says))


def _generation(key: str, value: object, *says: str) -> Case:
    edit = edit_json(GENERATION_CONFIG, lambda generation: generation.update({key: value}))
    return Case(edit, GENERATION_CONFIG, (f"{key}: ", *says))


CONFIGS: dict[str, Case] = {
    "config missing": Case(remove(CONFIG), CONFIG, ("No such file",)),
    "config empty": Case(write(CONFIG, ""), CONFIG, ("the file is empty",)),
    "config of blanks": Case(write(CONFIG, " \n"), CONFIG, ("the file is empty",)),
    "config cut": Case(write(CONFIG, '{"architectures": ['), CONFIG, ("not valid JSON",)),
    "config not JSON": Case(write(CONFIG, "<html>"), CONFIG, ("not valid JSON",)),
    "config of bad UTF-8": Case(write(CONFIG, b'{"a": "\xff"}'), CONFIG, ("not valid JSON",)),
    "config nested deeply": Case(write(CONFIG, "[" * 200_000), CONFIG, ("not valid JSON",)),
    "config a list": Case(write(CONFIG, "[1]"), CONFIG, ("a JSON list, not an object",)),
    "config with NaN": Case(
        write(CONFIG, json.dumps(SERVED | {"rms_norm_eps": float("nan")})),
        CONFIG,
        ("NaN is not a JSON number",),
    ),
    "config with -Infinity": Case(
        write(CONFIG, json.dumps(SERVED | {"rope_theta": -float("inf")})),
        CONFIG,
        ("-Infinity is not a JSON number",),
    ),
    "config an LFS pointer": Case(
        write(CONFIG, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        CONFIG,
        ("not valid JSON",),
    ),
    "config with 1e400": Case(
        write(CONFIG, json.dumps(SERVED).replace("1e-05", "1e400")),
        CONFIG,
        ("rms_norm_eps: Infinity is not a number",),
    ),
    "config with a number of 5,000 digits": Case(
        write(CONFIG, '{"a": ' + "9" * 5000 + "}"), CONFIG, ("not valid JSON",)
    ),
    "config of 65 MB": Case(
        lambda folder: os.truncate(folder / CONFIG, 65 << 20), CONFIG, ("larger than",)
    ),
    "config is a folder": Case(replaced_by(CONFIG, Path.mkdir), CONFIG, ("is a directory",)),
    "config is a pipe": Case(replaced_by(CONFIG, os.mkfifo), CONFIG, ("not a regular file",)),
    "config is a device": Case(
        replaced_by(CONFIG, link_to("/dev/zero")), CONFIG, ("not a regular file",)
    ),
    "config links to nothing": Case(
        replaced_by(CONFIG, link_to("../blobs/gone")), CONFIG, ("No such file",)
    ),
    "config links to itself": Case(
        replaced_by(CONFIG, link_to_itself), CONFIG, ("symbolic links",)
    ),
    "unknown architecture": _config("GPT2LMHeadModel", architectures=["GPT2LMHeadModel"]),
    "no architecture": _config("missing", architectures=None),
    "architecture of junk": _config("is not one of", architectures=[[]]),
    "architecture of a megabyte": _config("AAA…", architectures=["A" * 2**20]),
    "architecture that steers the terminal": _config(r"\u001b[2J\n", architectures=["\x1b[2J\n"]),
    "architecture of half a character": _config(r"\ud800", architectures=["\ud800"]),
    "architecture nested deeply": Case(
        write(CONFIG, '{"architectures": ' + "[" * 900 + "]" * 900 + "}"),
        CONFIG,
        ("architectures: ", "is not one of"),
    ),
    "negative layers": _config("-1 is not an integer from 1", num_hidden_layers=-1),
    "no layers": _config("0 is not an integer from 1", num_hidden_layers=0),
    "layers as text": _config('"2" is not an integer', num_hidden_layers="2"),
    "layers a fraction": _config("2.5 is not an integer", num_hidden_layers=2.5),
    "layers true": _config("true is not an integer", num_hidden_layers=True),
    "a thousand layers": _config("only 21 tensors", num_hidden_layers=1024),
    "more layers": Case(
        set_config(num_hidden_layers=3), "", ("model.layers.2.", "9 of 30 tensors missing")
    ),
    "fewer layers": Case(
        set_config(num_hidden_layers=1), WEIGHTS, ("model.layers.1.", "does not have")
    ),
    "heads do not divide the width": _config(
        "7 does not divide 48", num_attention_heads=7, num_key_value_heads=7
    ),
    "key heads do not divide the heads": _config("4 does not divide 6", num_key_value_heads=4),
    "odd head size": _config("7 is odd", head_dim=7),
    "heads negative": _config("-6 is not an integer from 1", num_attention_heads=-6),
    "no key heads": _config("0 is not an integer from 1", num_key_value_heads=0),
    "head size zero": _config("0 is not an integer", head_dim=0),
    "hidden_size missing": _config("missing", hidden_size=None),
    "hidden_size negative": _config("-48 is not an integer from 1", hidden_size=-48),
    "intermediate_size of another model": Case(
        set_config(intermediate_size=81), WEIGHTS, ("[80, 48]", "config.json asks for [81, 48]")
    ),
    "vocab_size zero": _config("0 is not an integer from 1", vocab_size=0),
    "epsilon negative": _config("-1 is not a number from 0 to 1", rms_norm_eps=-1),
    "tied a text": _config('"no" is not true or false', tie_word_embeddings="no"),
    "vocab_size above the embedding rows": Case(
        set_config(vocab_size=NUM_TOKENS + 1),
        WEIGHTS,
        ("model.embed_tokens.weight", f"[{NUM_TOKENS}, 48]", f"[{NUM_TOKENS + 1}, 48]"),
    ),
    "vocab_size below the embedding rows": Case(
        set_config(vocab_size=NUM_TOKENS - 1),
        WEIGHTS,
        ("model.embed_tokens.weight", f"[{NUM_TOKENS - 1}, 48]"),
    ),
    "vocab_size huge": _config("is not an integer", vocab_size=2**40),
    "hidden_size huge": Case(
        set_config(hidden_size=6 * 2**17, head_dim=8),
        WEIGHTS,
        ("model.embed_tokens.weight", "[2048, 786432]"),
    ),
    "max_position huge": _config("1099511627776", max_position_embeddings=2**40),
    "max_position missing": _config("missing", max_position_embeddings=None),
    "torch_dtype odd": _config("float8", "float32, bfloat16, float16", torch_dtype="float8"),
    "torch_dtype a number": _config("16 is not supported", torch_dtype=16),
    "activation unknown": _config('"gelu" is not supported', hidden_act="gelu"),
    "rope unknown": Case(
        set_config(rope_scaling={"type": "longrope"}), CONFIG, ("rope_scaling: type: ",)
    ),
    "rope not an object": _config("is not an object", rope_scaling=[YARN_ROPE]),
    "rope_theta zero": _config("0 is not a number from 2", rope_theta=0),
    "rope_theta one": _config("1 is not a number from 2", rope_theta=1, rope_scaling=YARN_ROPE),
    "yarn without a length": _yarn("original_max_position_embeddings", None, "missing"),
    "yarn of a negative length": _yarn("original_max_position_embeddings", -64, "-64"),
    "yarn that shrinks": _yarn("factor", 0, "0 is not a number from 1"),
    "yarn of a text": _yarn("factor", "40", '"40" is not a number'),
    "yarn with its bounds swapped": Case(
        set_config(rope_scaling=YARN_ROPE | {"beta_fast": 1, "beta_slow": 32}),
        CONFIG,
        ("rope_scaling: beta_fast: 1 is below beta_slow 32",),
    ),
    "yarn with a bound of zero": _yarn("beta_slow", 0, "0 is not a number"),
    "yarn with a negative mscale": _yarn("mscale", -1, "-1 is not a number"),
    "yarn with a factor of zero": _yarn("attention_factor", 0, "0 is not a number"),
    "linear rope without a factor": Case(
        set_config(rope_scaling={"type": "linear"}), CONFIG, ("rope_scaling: factor: missing",)
    ),
    "eos outside the vocabulary": _config(f"{NUM_TOKENS} is outside", eos_token_id=NUM_TOKENS),
    "eos negative": _config("-1 is outside", eos_token_id=-1),
    "eos a text": _config('"</s>" is not a token id', eos_token_id="</s>"),
    "quantized by GPTQ": Case(
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        CONFIG,
        ("quantization_config: quant_method: ", '"gptq"', "only fp8"),
    ),
    **of_config(
        SERVED_V3,
        {
            "eight million experts": _config(
                "8380416 experts",
                num_hidden_layers=1024,
                n_routed_experts=8192,
                n_group=1,
                topk_group=1,
            ),
            "no experts": _config("0 is not an integer from 1", n_routed_experts=0),
            "groups do not divide the experts": _config("5", n_group=5),
            "more experts chosen than there are": _config("from 1 to 6", num_experts_per_tok=13),
            "more dense layers than layers": _config("4 is not", first_k_dense_replace=4),
            "routing by softmax": _config('"softmax" is not supported', scoring_func="softmax"),
            "experts scaled without end": _config("1e+308 is not", routed_scaling_factor=1e308),
            "latent of rank zero": _config("0 is not an integer from 1", kv_lora_rank=0),
            "rotary part odd": _config("7 is odd", qk_rope_head_dim=7),
            "a billion MTP layers": _config("from 0 to 16", num_nextn_predict_layers=2**30),
            "V3.2 without its indexer's size": _config(
                "missing",
                index_topk=None,
                index_n_heads=16,
                index_head_dim=12,
                architectures=["DeepseekV32ForCausalLM"],
            ),
        },
    ),
    "generation_config not JSON": Case(
        write(GENERATION_CONFIG, "{"), GENERATION_CONFIG, ("not valid JSON",)
    ),
    "generation_config a list": Case(
        write(GENERATION_CONFIG, "[]"), GENERATION_CONFIG, ("not an object",)
    ),
    "generation_config empty": Case(
        write(GENERATION_CONFIG, ""), GENERATION_CONFIG, ("the file is empty",)
    ),
    "generation_config is a folder": Case(
        replaced_by(GENERATION_CONFIG, Path.mkdir), GENERATION_CONFIG, ("is a directory",)
    ),
    "generation_config too hot": _generation("temperature", 99, "not a number from 0 to 2"),
    "generation_config of texts": _generation("top_p", "0.95", '"0.95" is not a number'),
    "generation_config that repeats": _generation("repetition_penalty", 0, "0 is not a number"),
    "generation_config with eos outside the vocabulary": _generation(
        "eos_token_id", [1, NUM_TOKENS], f"{NUM_TOKENS} is outside the vocabulary"
    ),
    "generation_config links to nothing": Case(
        replaced_by(GENERATION_CONFIG, link_to("../blobs/gone")),
        GENERATION_CONFIG,
        ("No such file",),
    ),
}
