"""A decode step asks nothing of the host, and no row of it follows from its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.graphs import GraphKey
from runtime.models.layers import Fp8Format
from runtime.runner import ModelRunner
from runtime.sampler_rows import SamplingKind
from runtime.staging import Staging, views
from tests.runtime.checkpoints import MECHANISMS, write_checkpoint
from tests.runtime.pages import Pages, load, random_tokens

KINDS = [SamplingKind(all_greedy=True), SamplingKind(False, True, True, True)]
# torch operations that read a value back, or have a shape that follows from values
READING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "repeat_interleave",
}


READING_METHODS = ("tolist", "numpy", "cpu")  # of a tensor; they dispatch nothing on a CPU


class Operations(TorchDispatchMode):
    """Notes the names of the torch operations that run, and of methods that read values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: set[str] = set()
        for method in READING_METHODS:
            monkeypatch.setattr(torch.Tensor, method, self._noting(method))

    def _noting(self, method: str) -> Any:
        original = getattr(torch.Tensor, method)

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.names.add(method)
            return original(*args, **kwargs)

        return noting

    @property
    def reading(self) -> set[str]:
        known = READING | set(READING_METHODS)
        return {name for name in self.names if name in known or name.endswith("by a mask")}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.names.add(f"{name} by a mask" if has_mask else name)
        return func(*args, **(kwargs or {}))


def make_runner(name: str, tmp_path: Path) -> ModelRunner:
    fp8 = Fp8Format() if "fp8" in name else None
    model = load(write_checkpoint(tmp_path, MECHANISMS[name]), fp8=fp8)
    return ModelRunner(
        model,
        num_pages=8,
        page_size=8,
        max_num_seqs=4,
        max_model_len=64,
        num_tokens=101,
        eos_token_ids=frozenset(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_decode_step_reads_nothing_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(name, tmp_path)
    staging = Staging(runner.device)
    for kind in KINDS:
        key = GraphKey(batch_size=3, context_limit=64, kind=kind)
        inputs = views(staging.memory, staging.pack(runner._padding(key)))
        with (
            monkeypatch.context() as patch,
            torch.inference_mode(),
            Operations(patch) as operations,
        ):
            runner._recorded_step(key, inputs)
        assert "index_copy_" in operations.names  # the step ran under watch
        assert not operations.reading


@pytest.mark.interpreter
def test_what_reads_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with Operations(monkeypatch) as operations:
        values = torch.arange(4)
        values[values > 1].sum().item()
        values.tolist()
    assert operations.reading == {"index by a mask", "_local_scalar_dense", "tolist"}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "deepseek_v2_lite", "deepseek_v3 fp8", "deepseek_v32, sparse"]
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(name: str, tmp_path: Path) -> None:
    """Through every op of a decode step and of a prompt's chunk, to the logits.

    Ops that only the other families have are shown in batches of 64 in `tests/kernels`.
    """
    fp8 = Fp8Format() if "fp8" in name else None
    folder = write_checkpoint(tmp_path, MECHANISMS[name])
    model = load(folder, torch.float16, fp8=fp8, batch_invariant=True)
    pages = Pages(model, torch.float16)
    generator = torch.Generator().manual_seed(0)
    for layer in pages.caches:  # whatever the sequences are, their past is there
        for cache in layer.values():
            cache.normal_(generator=generator)
    batch_sizes = [2, 64] if name in ("qwen3", "deepseek_v2_lite") else [2, 6]
    lengths = [30, *(1 + seq % 7 for seq in range(1, batch_sizes[-1]))]
    prompts = [random_tokens(length, 101, seed=seq) for seq, length in enumerate(lengths)]
    decodes = [
        (seq, prompt, length - 1, length)
        for seq, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    [alone] = pages.step(decodes[0])
    for num_seqs in batch_sizes:
        assert torch.equal(pages.step(*decodes[:num_seqs])[0], alone)
    moved = [*decodes[1:6], decodes[0]]
    assert torch.equal(pages.step(*moved)[5], alone)

    chunk = (0, prompts[0], 10, 30)
    [chunk_alone] = pages.step(chunk)
    beside = pages.step(*decodes[1:3], (3, prompts[3], 0, 3), chunk)
    assert torch.equal(beside[3], chunk_alone)
