"""The model families: what a family provides, and which one runs an architecture."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.batch import PagedBatch
from runtime.config import Fields
from runtime.models.deepseek_v1 import build_deepseek_v1, parse_deepseek_v1
from runtime.models.deepseek_v2 import build_deepseek_v2, parse_deepseek_v2
from runtime.models.deepseek_v3 import build_deepseek_v3, parse_deepseek_v3
from runtime.models.deepseek_v32 import build_deepseek_v32, parse_deepseek_v32
from runtime.models.llama import build_llama, parse_llama, parse_qwen2
from runtime.models.qwen3 import build_qwen3, parse_qwen3


class ModelConfig(Protocol):
    """What the engine reads from any family's frozen config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


class CausalLM(Protocol):
    """A model as the engine sees it. Built with uninitialised parameters, then loaded."""

    @property
    def config(self) -> ModelConfig: ...

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint tensor name -> contiguous tensor to fill, which rules shape and dtype."""

    def ignores(self, name: str) -> bool:
        """Whether a tensor that is no target may be in the checkpoint and is skipped."""

    def finish_loading(self) -> None:
        """Make what derives from the weights and the config; call once, after loading."""

    def cache_spec(self) -> list[dict[str, tuple[int, ...]]]:
        """Per layer: name -> shape per token. A cache is [num_pages, page_size, *shape]."""

    def forward(
        self, token_ids: Tensor, batch: PagedBatch, caches: list[dict[str, Tensor]]
    ) -> Tensor:
        """[num_tokens] int64 -> hidden states after the final norm, [num_tokens, hidden].

        Writes the step's tokens into ``caches`` (one dict per layer, as in ``cache_spec``).
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden] -> [num_rows, vocab] fp32."""


@dataclass(frozen=True, slots=True)
class Family:
    """How to read a config.json, given the names of the tensors beside it, and what to build."""

    parse_config: Callable[[Fields, Container[str]], ModelConfig]
    build: Callable[..., CausalLM]  # (config, placement, max_model_len)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(parse_llama, build_llama),
    "Qwen2ForCausalLM": Family(parse_qwen2, build_llama),
    "Qwen3ForCausalLM": Family(parse_qwen3, build_qwen3),
    "DeepseekForCausalLM": Family(parse_deepseek_v1, build_deepseek_v1),
    "DeepseekV2ForCausalLM": Family(parse_deepseek_v2, build_deepseek_v2),
    "DeepseekV3ForCausalLM": Family(parse_deepseek_v3, build_deepseek_v3),
    "DeepseekV32ForCausalLM": Family(parse_deepseek_v32, build_deepseek_v32),
}
