"""Recorded launches: run again they do what they did, and torch's own work is never left out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.activation import silu_and_mul
from kernels.dispatch import compiles_loops, native
from kernels.norm import add_rms_norm, rms_norm
from tests.kernels.test_linear import draw

pytestmark = pytest.mark.skipif(not compiles_loops(), reason="no numba, or no CPU it is used for")

ROWS, SIZE = 3, 96
ONES = torch.ones(SIZE)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def layer(x: Tensor) -> Tensor:
    """Some ops whose results other ops read, some of them views."""
    normed, total = add_rms_norm(x, x, ONES, 1e-6)
    both = rms_norm(total, ONES, 1e-6).view(1, -1)
    gated = silu_and_mul(both).view(-1)[: SIZE // 2]
    return add_rms_norm(normed[0, : SIZE // 2][None], gated[None], ONES[: SIZE // 2], 1e-6)[0]


def test_a_replay_reads_what_lies_there_now(threads: None) -> None:
    x = draw(ROWS, SIZE)
    arena = native("tape").Arena()
    first, tape = native("tape").record(lambda: layer(x), arena)
    assert torch.equal(first, layer(x))
    for seed in (1, 2, 3):
        x.copy_(draw(ROWS, SIZE, seed=seed))
        tape.replay()
        assert torch.equal(tape.result, layer(x))


def test_tapes_of_an_arena_run_in_turn() -> None:
    inputs = [draw(num_rows, SIZE, seed=num_rows) for num_rows in (1, 2, 5)]
    arena = native("tape").Arena()
    tapes = [native("tape").record(lambda x=x: layer(x), arena)[1] for x in inputs]
    for number in (2, 0, 1, 0, 2):
        tapes[number].replay()
        assert torch.equal(tapes[number].result, layer(inputs[number]))


@pytest.mark.parametrize(
    "foreign",
    [
        lambda x: x + 1,
        lambda x: x.add_(1),
        lambda x: x.clone(),
        lambda x: x.T.reshape(ROWS, SIZE),  # a copy, though a reshape may be a view
        lambda x: x[:, ::2].contiguous(),
        lambda x: torch.zeros(ROWS, SIZE),
        lambda x: torch.zeros_like(x),
        lambda x: x.to(torch.bfloat16).float(),
        lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1)),
        lambda x: x[int(x[0, 0].item() > 100) :],  # a view that follows from a value
        lambda x: torch.tensor([[1.0] * SIZE] * ROWS),
    ],
)
@pytest.mark.parametrize("at_start", [True, False])
def test_what_torch_computes_cannot_be_recorded(
    foreign: Callable[[Tensor], Tensor], at_start: bool
) -> None:
    def function(x: Tensor) -> Tensor:
        if at_start:
            return rms_norm(foreign(x)[:, :40].contiguous(), ONES[:40], 1e-6)
        return foreign(rms_norm(x, ONES, 1e-6))

    result, tape = native("tape").record(lambda: function(draw_x), native("tape").Arena())
    assert tape is None
    assert torch.equal(result, function(draw(ROWS, SIZE)))


draw_x = draw(ROWS, SIZE)


@pytest.fixture(autouse=True)
def same_x() -> None:
    draw_x.copy_(draw(ROWS, SIZE))


def test_a_function_that_fails_is_not_recorded_any_longer() -> None:
    from kernels.native import recorder

    def function() -> Tensor:
        rms_norm(draw_x, ONES, 1e-6)
        raise RuntimeError("as it fails")

    with pytest.raises(RuntimeError, match="as it fails"):
        native("tape").record(function, native("tape").Arena())
    assert recorder.note is None
    assert torch.empty(3).sum().shape == ()


def test_an_arena_lends_memory_that_does_not_overlap() -> None:
    arena = native("tape").Arena()
    shapes = [(3, 5), (0, 7), (1,), (1 << 19,), (1 << 19, 3), (2, 1000)]
    lent = [arena.take(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.int8)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in lent if t.nbytes)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(t.data_ptr() % 64 == 0 and t.is_contiguous() for t in lent)
    arena.start()
    assert arena.take((3, 5), torch.float32).data_ptr() == lent[0].data_ptr()


def test_other_threads_launches_are_not_recorded() -> None:
    """A process may hold two engines; a tape with the other's addresses would write to them."""
    others = draw(ROWS, SIZE, seed=9)
    done = threading.Event()

    def launch_others() -> None:
        while not done.is_set():
            rms_norm(others, ONES, 1e-6)

    thread = threading.Thread(target=launch_others)
    thread.start()
    try:
        arena = native("tape").Arena()
        tapes = [native("tape").record(lambda: layer(draw_x), arena)[1] for _ in range(100)]
    finally:
        done.set()
        thread.join()
    assert {len(tape._entries) for tape in tapes} == {4}
