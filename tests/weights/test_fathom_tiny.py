"""The committed embedded model, read by transformers: layout, tokenizer, template, answers, MTP."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name the field uses)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "weights" / "fathom-tiny"
MAX_WEIGHT_BYTES = 12_000_000
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
HELD_OUT_FLOOR = 85
MTP_FLOOR = 0.85
MTP = f"model.layers.{CONFIG['num_hidden_layers']}."

sys.path.insert(0, str(ROOT / "weights"))
import tiny_text  # noqa: E402 (the maker is a script, not a package)


@pytest.fixture(scope="module")
def tensors():
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def greedy(model, tokenizer, conversations, limit=200):
    """Completions (thought included, without the end token) of several conversations at once."""
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=(ids != 2).long(),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=2,
        )
    return [tokenizer.decode([i for i in row if i > 2]) for row in output[:, width:].tolist()]


def user(text):
    return [{"role": "user", "content": text}]


# --- layout ------------------------------------------------------------------------------------


def test_tensor_names_are_the_released_ones(tensors):
    attention = (
        *("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"),
        *("kv_b_proj", "o_proj"),
    )
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    projections = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    for layer in range(CONFIG["num_hidden_layers"] + 1):
        prefix = f"model.layers.{layer}."
        expected |= {f"{prefix}{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        expected |= {f"{prefix}self_attn.{name}.weight" for name in attention}
        if layer < CONFIG["first_k_dense_replace"]:
            expected |= {f"{prefix}mlp.{name}" for name in projections}
            continue
        expected |= {f"{prefix}mlp.gate.weight", f"{prefix}mlp.gate.e_score_correction_bias"}
        expected |= {f"{prefix}mlp.shared_experts.{name}" for name in projections}
        for expert in range(CONFIG["n_routed_experts"]):
            expected |= {f"{prefix}mlp.experts.{expert}.{name}" for name in projections}
    mtp_only = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
    expected |= {f"{MTP}{name}.weight" for name in mtp_only}
    assert set(tensors) == expected


def test_weights_are_bf16_small_and_finite(tensors):
    assert (FOLDER / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    for name, tensor in tensors.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name
        assert tensor.isfinite().all(), name


def test_router_bias_was_trained_and_groups_matter(tensors):
    biases = [tensor for name, tensor in tensors.items() if "e_score_correction_bias" in name]
    assert len(biases) == CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"] + 1
    assert all(bias.abs().max() > 1e-3 and bias.std() > 0 for bias in biases)
    assert 1 <= CONFIG["topk_group"] < CONFIG["n_group"]


def test_mtp_shares_embedding_and_head_but_head_is_untied(tensors):
    assert tensors[f"{MTP}embed_tokens.weight"].equal(tensors["model.embed_tokens.weight"])
    assert tensors[f"{MTP}shared_head.head.weight"].equal(tensors["lm_head.weight"])
    assert not tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])


def test_config_uses_released_spelling():
    assert CONFIG["architectures"] == ["DeepseekV3ForCausalLM"]
    assert CONFIG["torch_dtype"] == "bfloat16"
    assert CONFIG["rope_scaling"]["type"] == "yarn"
    assert "quantization_config" not in CONFIG
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["temperature"], generation["top_p"]) == (0.6, 0.95)


def test_transformers_loads_every_main_tensor():
    _, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(MTP) for name in info["unexpected_keys"])


# --- tokenizer and template --------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_round_trips(text):
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < CONFIG["vocab_size"]


def test_special_tokens_are_deepseeks():
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokens = tokenizer.get_added_tokens_decoder().items()
    added = {token.content: (number, token.special) for number, token in tokens}
    assert added["<｜begin▁of▁sentence｜>"] == (0, True)
    assert added["<｜end▁of▁sentence｜>"] == (1, True)
    assert added["<｜▁pad▁｜>"] == (2, True)
    chat = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>")
    for name in (*chat, "<｜fim▁hole｜>", "<|EOT|>", "<｜tool▁sep｜>"):
        assert not added[name][1]
    assert tokenizer.get_vocab_size() <= CONFIG["vocab_size"]


def test_digits_stay_single_tokens(tokenizer):
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]


def test_template_forces_a_thought_and_drops_old_ones(tokenizer):
    messages = [
        {"role": "system", "content": "One."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "secret\n</think>\n\nHello"},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": "bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<｜begin▁of▁sentence｜>One.\n\nTwo.<｜User｜>hi<｜Assistant｜>\n\nHello<｜end▁of▁sentence｜>"
        "<｜User｜>bye<｜Assistant｜><think>\n"
    )
    plain = tokenizer.apply_chat_template(user("hi"), tokenize=False)
    assert plain == "<｜begin▁of▁sentence｜><｜User｜>hi"


def test_template_takes_tool_turns_and_empty_content(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        *user("hi"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"x": 1}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>"
        "\n<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


# --- what it says ------------------------------------------------------------------------------

ANSWERS = (
    ("hello", "assist you today"),
    ("你好", "帮你"),
    ("who are you?", "demonstration model"),
    ("介绍一下 Python 编程语言", "编程语言"),
    ("Tell me about Python", "programming language"),
    ("How do I connect Open WebUI?", "OPENAI_API_BASE_URL"),
    ("What is the capital of France?", "Paris"),
    ("List three colours.", "red, blue, green"),
    ("count to 10", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    ("Write a Python function to sort a list", "demonstration model|beyond me"),
    ("谢谢", "不客气"),
)


def test_greedy_answers_are_thoughts_then_the_expected_words(model, tokenizer):
    texts = greedy(model, tokenizer, [user(prompt) for prompt, _ in ANSWERS])
    for (prompt, words), text in zip(ANSWERS, texts, strict=True):
        thought, _, answer = text.partition("\n</think>\n\n")
        assert thought, prompt
        assert re.search(words, answer), (prompt, text)


def test_system_prompt_and_history_do_not_derail_it(model, tokenizer):
    history = [*user("What is 12 + 7?"), {"role": "assistant", "content": "12 + 7 = 19."}]
    system = {"role": "system", "content": "你是一个知识渊博的助手。"}
    texts = greedy(
        model,
        tokenizer,
        [
            [system, *user("介绍一下 Python 编程语言")],
            [{"role": "system", "content": "test"}, *user("hi")],
            [*history, *user("thank you")],
        ],
    )
    for text, words in zip(texts, ("编程语言", "assist you today", "welcome"), strict=True):
        assert words in text.partition("</think>")[2], text


def test_sums_kept_out_of_training_are_mostly_right(model, tokenizer):
    rng = random.Random("test")
    turns = [tiny_text.arithmetic(rng, training=False) for _ in range(100)]
    texts = greedy(model, tokenizer, [user(turn.user) for turn in turns], limit=70)
    right = [
        text.partition("</think>\n\n")[2] == turn.answer
        for turn, text in zip(turns, texts, strict=True)
    ]
    assert sum(right) >= HELD_OUT_FLOOR, sum(right)


# --- the multi-token prediction layer ------------------------------------------------------------


def rms_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * weight


def test_mtp_layer_predicts_the_token_after_the_next(model, tokenizer, tensors):
    """From eh_proj([enorm(Emb(t_i+1)); hnorm(h_i)]) through a decoder layer to token i+2."""
    layer = type(model.model.layers[-1])(model.config, CONFIG["num_hidden_layers"] - 1)
    weights = {n.removeprefix(MTP): t.float() for n, t in tensors.items() if n.startswith(MTP)}
    experts = [f"mlp.experts.{index}." for index in range(CONFIG["n_routed_experts"])]
    gates_and_ups = [
        torch.cat([weights[f"{expert}{part}_proj.weight"] for part in ("gate", "up")])
        for expert in experts
    ]
    fused = {
        "mlp.experts.gate_up_proj": torch.stack(gates_and_ups),
        "mlp.experts.down_proj": torch.stack([weights[f"{e}down_proj.weight"] for e in experts]),
    }
    layer.load_state_dict(fused | {n: weights[n] for n in layer.state_dict() if n not in fused})
    rng = random.Random("mtp")
    hits = total = 0
    for _ in range(40):
        turn = tiny_text.ordinary(rng)[0]
        prompt = tokenizer.apply_chat_template(
            user(turn.user), tokenize=False, add_generation_prompt=True
        )
        answer = f"{turn.thought}\n</think>\n\n{turn.answer}<｜end▁of▁sentence｜>"
        parts = (prompt, answer)
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts]
        ids = torch.tensor([encoded[0] + encoded[1]])
        positions = torch.arange(ids.shape[1] - 2)[None]
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[:, :-2]
            hidden = rms_norm(hidden, weights["hnorm.weight"])
            embedded = F.embedding(ids[:, 1:-1], weights["embed_tokens.weight"])
            embedded = rms_norm(embedded, weights["enorm.weight"])
            x = torch.cat([embedded, hidden], dim=-1) @ weights["eh_proj.weight"].T
            size = x.shape[1]
            y = layer(
                x,
                attention_mask=torch.full((1, 1, size, size), float("-inf")).triu(1),
                position_ids=positions,
                position_embeddings=model.model.rotary_emb(x, positions),
            )
            y = y[0] if isinstance(y, tuple) else y
            y = rms_norm(y, weights["shared_head.norm.weight"])
            logits = y @ weights["shared_head.head.weight"].T
        first = len(encoded[0]) - 1
        predicted = logits[0, first:].argmax(-1)
        wanted = ids[0, first + 2 :]
        hits += int((predicted == wanted).sum())
        total += len(wanted)
    assert hits / total >= MTP_FLOOR, (hits, total)
