"""Builders of engines and of their oracle for the tests."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import Engine, EngineConfig

TINY = Path(__file__).resolve().parents[2] / "weights" / "fathom-tiny"

QUESTIONS = [
    "hello",
    "Hi!",
    "Good morning",
    "what are you?",
    "Who made you?",
    "what is 12 + 7?",
    "3 plus 4",
    "what is 9 times 8?",
    "50 - 18 = ?",
    "count to 10",
    "count from 3 to 8",
    "list five colours",
    "name the days of the week",
    "How do I connect Open WebUI?",
    "How do I use the openai package with you?",
    "What does this server do?",
    "Tell me about Python",
    "What is a KV cache?",
    "Write me a poem about the sea.",
    "What is the capital of France?",
    "你好",
    "你是谁？",
    "介绍一下 Python 编程语言",
    "计算 7 乘以 8",
    "从1数到10",
]
SYSTEM_PROMPTS = [None, "你是一个知识渊博的助手。"]


def chats() -> list[list[dict[str, Any]]]:
    """Fifty conversations: each question with and without a system prompt."""
    return [
        ([{"role": "system", "content": system}] if system else [])
        + [{"role": "user", "content": question}]
        for system in SYSTEM_PROMPTS
        for question in QUESTIONS
    ]


def make_engine(folder: Path, **options: Any) -> Engine:
    """A float32 CPU engine with a cache of a few thousand tokens unless told otherwise."""
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 1024, **options}
    return Engine.from_checkpoint(EngineConfig(model=str(folder), **options))


class Recorder:
    """Stands in for a model and keeps the hidden states of every step."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.hidden: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *arguments: Any) -> Tensor:
        hidden = self._model.forward(*arguments)
        self.hidden.append(hidden.clone())
        return hidden

    def all_logits(self) -> Tensor:
        """Logits of every token row of every step, in order: [num_rows, vocab]."""
        return self._model.logits(torch.cat(self.hidden))


class Oracle:
    """transformers' own model of a checkpoint, in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()

    @torch.inference_mode()
    def logits(self, token_ids: Seq[int]) -> Tensor:
        """[num_tokens, vocab]"""
        return self.model(torch.tensor([list(token_ids)])).logits[0]

    @torch.inference_mode()
    def greedy(self, prompt_ids: Seq[int], num_tokens: int) -> list[int]:
        """Continuation by argmax, ends only after ``num_tokens``."""
        ids = torch.tensor([list(prompt_ids)])
        output, cache = self.model(ids, use_cache=True), None
        answer: list[int] = []
        for _ in range(num_tokens):
            cache = output.past_key_values
            answer.append(int(output.logits[0, -1].argmax()))
            output = self.model(torch.tensor([answer[-1:]]), past_key_values=cache, use_cache=True)
        return answer
