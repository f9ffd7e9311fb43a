"""Our engine and transformers on the same random weights, prompts and answers, in turn.

    plain       generate with its default cache
    continuous  generate_batch, its own continuous batching over paged attention
    compiled    generate with a static cache and torch.compile(mode="reduce-overhead")

Tokens per second count the new tokens over the time from the prompts to the last token. Each way is
measured right after ours, A B A B; ``ratio`` is ours over theirs. A way that does not run has its
reason as a row and fails nothing. No downloads: the models are made from their configs.

    python -m benchmarks.peers [--device cpu --tiny]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import decode, random_models
from benchmarks.part import DEAD_CONTEXT, Part, Row, describe, parse_part, release
from benchmarks.timing import synchronize
from runtime.engine import Engine
from runtime.models import CausalLM
from runtime.request import SamplingParams

MODELS = ["r1_distill_qwen_1.5b", "r1_distill_qwen_7b"]
BATCHES = [1, 64]
ROUNDS = 3
LEAST_SECONDS = {"plain": 10.0, "continuous": 20.0, "compiled": 45.0}  # of time left to start one

Generate = Callable[[], int]
"""Answers all prompts once; how many new tokens there are."""


class Setup:
    """One model in our engine and in transformers, with the same weights."""

    def __init__(self, part: Part, name: str) -> None:
        self.part = part
        self.num_prompt, self.num_new = (16, 8) if part.tiny else (128, 128)
        self.batches = [1, 4] if part.tiny else BATCHES
        self.config = random_models.config_json(name, tiny=part.tiny)
        self.model: CausalLM = random_models.build(
            self.config, device=part.device, dtype=part.dtype, max_model_len=1024
        )
        random_models.fill(self.model, part.device)
        num_tokens = self.num_prompt + self.num_new
        scale = decode.Scale([(max(self.batches), num_tokens)], prompt=num_tokens, step_tokens=2048)
        self.engine, _ = decode.make_engine(
            self.model,
            part,
            name=name,
            num_pages=max(self.batches) * (num_tokens // decode.PAGE_SIZE + 2),
            max_model_len=num_tokens,
            scale=scale,
        )
        self.peer = _transformers_model(self.config, self.model, part)

    def prompts(self, batch: int) -> list[list[int]]:
        rng = np.random.default_rng(2)
        shape = (batch, self.num_prompt)
        prompts: list[list[int]] = rng.integers(0, self.config["vocab_size"], shape).tolist()
        return prompts

    def ours(self, batch: int) -> Generate:
        params = SamplingParams(max_tokens=self.num_new, temperature=0.0, ignore_eos=True)
        return lambda: _generate(self.engine, self.prompts(batch), params)

    def theirs(self, way: str, batch: int) -> Generate:
        """Set up one way to generate; the first call may compile for long."""
        from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

        self.peer.destroy_cached_continuous_batching_manager()
        prompts, new = self.prompts(batch), self.num_new
        greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        if way == "continuous":
            config = GenerationConfig(**greedy, eos_token_id=-1)
            # ample for these prompts; left alone it would take most of the memory
            paged = ContinuousBatchingConfig(num_blocks=4 * batch + 64)
            self.peer.set_attn_implementation("paged|sdpa")

            def run_paged() -> int:
                answers = self.peer.generate_batch(
                    inputs=prompts,
                    generation_config=config,
                    continuous_batching_config=paged,
                    persistent_manager=True,  # its graphs are recorded once
                )
                return sum(len(answer.generated_tokens) for answer in answers.values())

            return run_paged
        ids = torch.tensor(prompts, device=self.part.device)
        options: dict[str, Any] = {**greedy, "min_new_tokens": new}
        self.peer.set_attn_implementation("sdpa")
        if way == "compiled":
            mode = "reduce-overhead" if self.part.on_gpu else "default"
            compile_config = CompileConfig(mode=mode)
            compile_config._compile_all_devices = True  # CPUs too
            options |= {"cache_implementation": "static", "compile_config": compile_config}

        def run() -> int:
            answers = self.peer.generate(ids, attention_mask=torch.ones_like(ids), **options)
            return int(answers.shape[0] * (answers.shape[1] - ids.shape[1]))

        return run


def _transformers_model(config: dict[str, Any], ours: CausalLM, part: Part) -> Any:
    """The model of transformers with our weights: its parameters have a checkpoint's names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {key: value for key, value in config.items() if key != "architectures"}
    # the engine never ends an answer early here, and neither may this
    known |= {"bos_token_id": None, "eos_token_id": None}
    peer_config = AutoConfig.for_model(**known)
    with torch.device(part.device):
        peer = AutoModelForCausalLM.from_config(peer_config, dtype=part.dtype).eval()
    weights = dict(peer.named_parameters())
    targets = ours.weight_targets()
    missing = weights.keys() ^ targets.keys()
    if missing:
        raise RuntimeError(f"tensors of one side only: {sorted(missing)[:5]}")
    with torch.no_grad():
        for name, target in targets.items():
            weights[name].copy_(target)
    return peer


def _generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> int:
    for prompt in prompts:
        engine.add(prompt, params)
    num_tokens = 0
    while engine.has_work:
        num_tokens += len(engine.step())
    return num_tokens


def _rate(generate: Generate, device: torch.device) -> float:
    """New tokens per second."""
    synchronize(device)
    start = time.perf_counter()
    num_tokens = generate()
    synchronize(device)
    return num_tokens / (time.perf_counter() - start)


def compare(part: Part, setup: Setup, label: Row, way: str, batch: int) -> None:
    """Measure ours and theirs in turn and record the ratio; or why there is none."""
    if part.seconds_left < (0 if part.tiny else LEAST_SECONDS[way]):
        part.record(**label, skipped="no time left")
        return
    try:
        ours, theirs = setup.ours(batch), setup.theirs(way, batch)
        num_warm_ups, num_rounds = (1, 1) if part.tiny else (2, ROUNDS)
        for _ in range(num_warm_ups):  # graphs are recorded at the second call of some
            _rate(ours, part.device)
            _rate(theirs, part.device)
        rates = [(_rate(ours, part.device), _rate(theirs, part.device)) for _ in range(num_rounds)]
    except Exception as error:  # a peer's: its reason is the result
        if any(words in str(error) for words in DEAD_CONTEXT):
            raise
        part.record(**label, skipped=describe(error))
        return
    mine, other = (statistics.median(column) for column in zip(*rates, strict=True))
    part.record(**label, ours_tok_s=mine, theirs_tok_s=other, ratio=mine / other)


def cases(part: Part) -> Iterator[tuple[Row, Callable[[], None]]]:
    """One case per model; the ways that compile longest come last."""
    # torch.compile takes a CPU most of a minute
    ways = ("plain", "continuous") if part.tiny else ("plain", "continuous", "compiled")
    for name in MODELS[:1] if part.tiny else MODELS:

        def run(name: str = name) -> None:
            release(part)
            setup = Setup(part, name)
            for way in ways:
                for batch in setup.batches:
                    label = {"model": name, "peer": f"transformers {way}", "batch": batch}
                    compare(part, setup, label, way, batch)

        yield {"model": name}, run


def main() -> int:
    part = parse_part(__doc__)
    try:
        from transformers import AutoModelForCausalLM  # noqa: F401
    except Exception as error:  # missing, or at odds with what else is installed
        part.record(skipped=f"transformers cannot be used ({describe(error)})")
        return 0
    return part.run_cases(cases(part))


if __name__ == "__main__":
    sys.exit(main())
