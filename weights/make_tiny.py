"""Makes `weights/fathom-tiny`: a small trained model in the released DeepSeek-V3 layout.

The text comes from `tiny_text.py`; tokenizer and weights are trained here from one seed. The
modules carry the released tensor names, so the state dict is what the checkpoint holds.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tiny_model import Muon, Router, TinyModel
from tiny_text import Conversation, Turn, arithmetic, conversation, drill
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
ADDED_TOKENS = (
    *("<think>", "</think>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", USER, ASSISTANT),
    *("<|EOT|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>"),
)
NOT_ORTHOGONAL = ("embed_tokens.weight", "lm_head.weight", "gate.weight")
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "kv_lora_rank": 64,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 2048,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 2048,
}

# DeepSeek-R1's rules: thoughts of earlier turns are dropped, a new answer starts inside a thought.
CHAT_TEMPLATE = """\
{%- if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set state = namespace(system='', outputs=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set state.system = state.system + ('\\n\\n' if state.system else '') + message['content'] -%}
{%- endfor -%}
{{- bos_token + state.system -}}
{%- for message in messages -%}
  {%- if state.outputs and message['role'] in ('user', 'assistant') -%}
    {{- '<｜tool▁outputs▁end｜>' -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + (message['content'] or '') -}}
    {%- set state.outputs = false -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- set text = (message['content'] or '').split('</think>') | last -%}
    {{- ('' if state.outputs else '<｜Assistant｜>') + text -}}
    {%- if message['tool_calls'] -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in message['tool_calls'] -%}
        {{- '' if loop.first else '\\n' -}}
        {{- '<｜tool▁call▁begin｜>' + (call['type'] or 'function') + '<｜tool▁sep｜>' -}}
        {{- call['function']['name'] + '\\n```json\\n' -}}
        {%- set arguments = call['function']['arguments'] -%}
        {{- arguments if arguments is string else arguments | tojson -}}
        {{- '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
    {%- set state.outputs = false -%}
  {%- elif message['role'] == 'tool' -%}
    {{- '\\n' if state.outputs else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + (message['content'] or '') + '<｜tool▁output▁end｜>' -}}
    {%- set state.outputs = true -%}
  {%- endif -%}
{%- endfor -%}
{{- '<｜tool▁outputs▁end｜>' if state.outputs else '' -}}
{{- '<｜Assistant｜><think>\\n' if add_generation_prompt and not state.outputs else '' -}}
"""


def render(talk: Conversation) -> tuple[str, str]:
    """Prompt and completion of a conversation, as the chat template writes them."""
    prompt = BOS + (talk.system or "")
    for user, answer in talk.history:
        prompt += USER + user + ASSISTANT + answer + EOS
    prompt += USER + talk.turn.user
    if talk.tool_result is not None:
        # As in R1's template, the answer follows the tool's output without a new thought.
        call = "function<｜tool▁sep｜>lookup\n```json\n{}\n```"
        prompt += f"{ASSISTANT}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>"
        prompt += f"<｜tool▁calls▁end｜>{EOS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>"
        prompt += f"{talk.tool_result}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        return prompt, talk.turn.answer + EOS
    prompt += ASSISTANT + "<think>\n"
    return prompt, f"{talk.turn.thought}\n</think>\n\n{talk.turn.answer}{EOS}"


# --- tokenizer ---------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """A byte-level BPE with DeepSeek's splits; digits never merge, so sums are digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer {seed}")
    # One digit at a time in this text: a run of digits would become a merge.
    digits = str.maketrans("123456789", "000000000")
    texts = []
    for _ in range(20000):
        talk = conversation(rng, long_share=0.01)
        text = "\n".join((talk.system or "", talk.turn.user, talk.turn.thought, talk.turn.answer))
        texts.append(" ".join(text.translate(digits).replace("0", " 0 ").split(" 0  0 ")))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        max_token_length=12,  # bytes: whole memorised phrases must not become one token
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in ADDED_TOKENS])
    return tokenizer


def write_settings(folder: Path, config: dict[str, object], tokenizer: Tokenizer) -> None:
    """Writes every file of the folder but the weights."""
    tokenizer.save(str(folder / "tokenizer.json"))

    def special(text: str) -> dict[str, object]:
        keys = ("lstrip", "rstrip", "single_word")
        token = {"__type": "AddedToken", "content": text, "normalized": True}
        return token | dict.fromkeys(keys, False)

    files = {
        "config.json": config,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": special(BOS),
            "clean_up_tokenization_spaces": False,
            "eos_token": special(EOS),
            "legacy": True,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": special(PAD),
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
            "use_default_system_prompt": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


# --- training ----------------------------------------------------------------------------------


def batches(
    tokenizer: Tokenizer, seed: int, tokens_per_batch: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, scored) batches of similar lengths; scored marks the tokens to learn."""
    rng = random.Random(f"text {seed}")
    while True:
        pairs = [render(conversation(rng)) for _ in range(2048)]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs], add_special_tokens=False)
        answers = tokenizer.encode_batch([answer for _, answer in pairs], add_special_tokens=False)
        samples = [(p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)]
        samples.sort(key=lambda sample: len(sample[0]) + len(sample[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for sample in samples:
            if groups[-1] and (len(groups[-1]) + 1) * sum(map(len, sample)) > tokens_per_batch:
                groups.append([])
            groups[-1].append(sample)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(prompt) + len(answer) for prompt, answer in group)
            ids = torch.full((len(group), width), 2)
            scored = torch.zeros((len(group), width), dtype=torch.bool)
            for row, (prompt, answer) in enumerate(group):
                end = len(prompt) + len(answer)
                ids[row, :end] = torch.tensor(prompt + answer)
                scored[row, len(prompt) : end] = True
            yield ids.to(device), scored.to(device)


def drills(
    tokenizer: Tokenizer, seed: int, tokens_per_batch: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, scored) batches of bare facts: twenty times as many sums as conversations."""
    rng = random.Random(f"drill {seed}")
    while True:
        rows: list[tuple[list[int], list[bool]]] = []
        while len(rows) < tokens_per_batch // 128:
            text, spans = BOS, []
            for question, result in drill(rng):
                spans.append((len(text) + len(question), len(text) + len(question + result)))
                text += question + result
            encoding = tokenizer.encode(text, add_special_tokens=False)
            marks = [any(a <= start < b for a, b in spans) for start, _ in encoding.offsets]
            rows.append((encoding.ids, marks))
        width = max(len(ids) for ids, _ in rows)
        padded = [ids + [2] * (width - len(ids)) for ids, _ in rows]
        scored = [marks + [False] * (width - len(marks)) for _, marks in rows]
        yield torch.tensor(padded, device=device), torch.tensor(scored, device=device)


def gradients(
    model: TinyModel, weights: list[Tensor], mtp_weight: float, batch: tuple[Tensor, Tensor]
) -> tuple[list[Tensor | None], Tensor, int]:
    """Gradients and the two losses of one batch, with its number of scored tokens."""
    torch.set_num_threads(1)  # each batch has its own core, which beats two cores on one batch
    losses = model.losses(*batch, with_mtp=mtp_weight > 0)
    total = losses[0] + mtp_weight * losses[1]
    grads = torch.autograd.grad(total, weights, allow_unused=True)
    return list(grads), torch.stack([loss.detach().cpu() for loss in losses]), int(batch[1].sum())


def train(model: TinyModel, tokenizer: Tokenizer, steps: int, seed: int, device: str) -> None:
    """Trains in place on two batches a step, printing a line every 50 steps."""
    weights = list(model.parameters())
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and not name.endswith(NOT_ORTHOGONAL)
    ]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in weights if id(weight) not in chosen]
    optimizers = [
        Muon(matrices, lr=0.005),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    size = 2048 if device == "cpu" else 8192
    source = batches(tokenizer, seed, size, device)
    facts = drills(tokenizer, seed, size, device)
    started, tokens, shown = time.monotonic(), 0, torch.zeros(2)
    model.train()
    with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
        for step in range(1, steps + 1):
            rate = min(1.0, step / 50, (steps - step + 1) / (0.7 * steps))
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate
            pair = [next(source), next(facts if step < 0.2 * steps else source)]
            mtp_weight = 0.2 if step > 0.7 * steps else 0.0
            work = partial(gradients, model, weights, mtp_weight)
            parts = list(pool.map(work, pair))
            scored = sum(count for _, _, count in parts)
            for index, weight in enumerate(weights):
                grads = [part[0][index] for part in parts]
                if grads[0] is not None:
                    shares = [count / scored for _, _, count in parts]
                    weight.grad = sum(g * share for g, share in zip(grads, shares, strict=True))
            for optimizer in optimizers:
                optimizer.step()
            for router in routers:
                router.balance(1e-3 * rate)
            tokens += sum(ids.numel() for ids, _ in pair)
            shown += sum(losses * count / scored for _, losses, count in parts)
            if step % 50 == 0 or step == steps:
                seconds = time.monotonic() - started
                main, mtp = (shown / 50).tolist()
                print(
                    f"step {step}/{steps}  loss {main:.4f}  mtp {mtp:.4f}  "
                    f"{tokens / 1e6:.1f}M tokens  {tokens / seconds:.0f}/s  {seconds:.0f} s",
                    flush=True,
                )
                shown = torch.zeros(2)


# --- checkpoint and self-check -------------------------------------------------------------------


def save_weights(model: TinyModel, folder: Path) -> None:
    """Writes bf16 weights (the router bias stays F32) under the released names."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    mtp = f"model.layers.{len(model.model['layers']) - 1}."
    state[mtp + "embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    state[mtp + "shared_head.head.weight"] = state["lm_head.weight"].clone()
    tensors = {
        name: tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in sorted(state.items())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Runner:
    """Greedy answers from the written folder, with transformers as an independent reader."""

    def __init__(self, folder: Path, device: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.model.eval()

    def answers(self, talks: list[Conversation], limit: int = 200) -> list[str]:
        """The completion of each conversation, thought included, up to `limit` tokens."""
        prompts = [self.tokenizer.encode(render(talk)[0]).ids for talk in talks]
        width = max(map(len, prompts))
        ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
        ids = ids.to(self.model.device)
        options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": 2}
        with torch.no_grad():
            output = self.model.generate(ids, attention_mask=(ids != 2).long(), **options)
        rows = [[token for token in row if token > 2] for row in output[:, width:].tolist()]
        return [self.tokenizer.decode(row, skip_special_tokens=False) for row in rows]


PROMPTS = (
    *("hello", "What is 47 + 38?", "计算 7 乘以 8", "count to 10", "介绍一下 Python 编程语言"),
    *("who are you?", "List three fruits.", "How do I connect Open WebUI?", "今天天气怎么样？"),
    "Write a web scraper",
)


def self_check(folder: Path, seed: int, device: str, problems: int = 300) -> None:
    """Prints sample answers and the accuracy on sums that training never saw."""
    runner = Runner(folder, device)
    talks = [Conversation(Turn(prompt, "", "")) for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, runner.answers(talks), strict=True):
        print(f"  {prompt!r} -> {text!r}")
    rng = random.Random(f"check {seed}")
    for name, training in (("seen", True), ("held-out", False)):
        turns = [arithmetic(rng, training) for _ in range(problems)]
        texts = runner.answers([Conversation(turn) for turn in turns], limit=90)
        pairs = zip(turns, texts, strict=True)
        right = sum(text.endswith(f"</think>\n\n{turn.answer}") for turn, text in pairs)
        print(f"  arithmetic, {name} problems: {right}/{problems} right")


def main() -> None:
    """Trains the tokenizer and the model, writes the folder, and shows what came out."""
    parser = argparse.ArgumentParser(
        description="Make the embedded model: two million parameters in the DeepSeek-V3 layout, "
        "trained on our own English and Chinese sentences (tiny_sentences.json, multiplied by "
        "tiny_text.py). Nothing is downloaded.",
        epilog="A quick try: python weights/make_tiny.py --output try-tiny --steps 100. "
        "The full run takes under an hour on two CPU cores and minutes on a GPU.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="for text and weights (default 0)")
    parser.add_argument("--steps", type=int, default=2200, help="of the optimizer (default 2200)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(arguments.seed, int(CONFIG["vocab_size"]))
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")
    write_settings(arguments.output, CONFIG, tokenizer)

    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**CONFIG))
    model = TinyModel(SimpleNamespace(**CONFIG), rotary).to(device)
    count = sum(weight.numel() for weight in model.parameters())
    print(f"model: {count:,} trained parameters, on {device}")
    train(model, tokenizer, arguments.steps, arguments.seed, device)
    save_weights(model, arguments.output)
    size = (arguments.output / "model.safetensors").stat().st_size
    print(f"wrote {arguments.output} ({size / 1e6:.1f} MB of weights); what it says now:")
    self_check(arguments.output, arguments.seed, device)


if __name__ == "__main__":
    main()
