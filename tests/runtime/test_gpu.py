"""The engine on a GPU: the CPU's tokens, graphs, steps that run ahead, nothing that waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import Engine, SamplingParams, Tokenizer
from tests.runtime.checkpoints import MECHANISMS, write_checkpoint
from tests.runtime.engines import TINY, chats, make_engine
from tests.runtime.pages import random_tokens

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
MODES = [
    {"run_ahead": 0, "cuda_graphs": "off"},
    {"run_ahead": 1, "cuda_graphs": "off"},
    {"run_ahead": 0, "cuda_graphs": "lazy"},
    {"run_ahead": 1, "cuda_graphs": "lazy"},
]


def on_gpu(folder: Path, **options: Any) -> Engine:
    """A float32 engine with a small cache: exact enough for its tokens to be the CPU's."""
    return make_engine(folder, **({"device": "cuda", "kv_cache_memory": 256 << 20} | options))


def tokens(engine: Engine, prompts: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(prompts, params)]


@pytest.fixture(scope="module", params=MECHANISMS)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A random checkpoint, prompts of ragged lengths, and the CPU's answers."""
    vocab_size = Tokenizer.load(TINY).num_tokens
    config = MECHANISMS[request.param] | {"vocab_size": vocab_size, "max_position_embeddings": 1024}
    folder = write_checkpoint(tmp_path_factory.mktemp("gpu"), config, with_tokenizer=True)
    lengths = [1, 2, 15, 16, 17, 33, 65, 130, 300]
    prompts = [random_tokens(length, vocab_size, seed=length) for length in lengths]
    return folder, prompts, tokens(make_engine(folder), prompts)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_every_way_to_run_gives_the_cpus_tokens(
    family: tuple[Path, list[list[int]], list[list[int]]], mode: dict[str, Any]
) -> None:
    folder, prompts, expected = family
    engine = on_gpu(folder, max_step_tokens=64, fp8_activations="off", **mode)
    assert tokens(engine, prompts) == expected
    assert tokens(engine, prompts[4:5]) == expected[4:5]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.load(TINY)
    return [tokenizer.encode_chat(chat).token_ids for chat in chats()]


def test_the_embedded_model_answers_as_on_the_cpu(prompts: list[list[int]]) -> None:
    each = [
        SamplingParams(
            **[{"temperature": 0.0}, {"seed": i}, {"seed": i, "top_p": 0.9, "top_k": 40}][i % 3],
            max_tokens=40,
        )
        for i in range(len(prompts))
    ]
    expected = make_engine(TINY).generate(prompts, each)
    assert on_gpu(TINY).generate(prompts, each) == expected


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any operation of torch that waits for the device raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("cuda_graphs", ["off", "lazy"])
def test_launching_a_decode_step_waits_for_nothing(
    prompts: list[list[int]], cuda_graphs: str
) -> None:
    engine = on_gpu(TINY, dtype="bfloat16", cuda_graphs=cuda_graphs)
    params = SamplingParams(max_tokens=20, ignore_eos=True, top_p=0.9)
    for prompt in prompts[:5]:
        engine.add(prompt, params)
    for _ in range(4):
        engine.step()  # the prompts, the compilation, the recording
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        plan = engine.scheduler.plan()
        assert plan is not None and plan.num_decodes == len(plan.chunks) == 5
        engine._in_flight.append((plan, engine.runner.launch(plan)))
    torch.cuda.set_sync_debug_mode("default")
    while engine.has_work:
        engine.step()


def test_all_graphs_can_be_recorded_at_the_start(prompts: list[list[int]]) -> None:
    engine = on_gpu(TINY, cuda_graphs="start", max_num_seqs=12)
    recorded = engine.runner.graphs.num_graphs  # type: ignore[attr-defined]
    assert recorded == len(engine.runner.graphs.usual_keys())  # type: ignore[attr-defined]
    tokens(engine, prompts[:11])
    assert engine.runner.graphs.num_graphs == recorded  # type: ignore[attr-defined]
