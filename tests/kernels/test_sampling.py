"""The sampler: exact distributions, ties, determinism, penalties, log-probabilities, NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from kernels import sampling_triton
from kernels.philox import uniforms
from kernels.sampling import Sampled, count_tokens, sample
from tests.kernels.passes import DEVICES, HALF, INTERPRETED
from tests.kernels.sampling_oracle import FloatArray, Row, draw, make_batch, probabilities

VOCAB_SIZE = 40
NUM_DRAWS = 200_000
ALPHA = 1e-4  # seeds are fixed, so a test that passes once always passes
COUNTS = {3: 1, 7: 4, 11: 2, 20: 1, 39: 9}
BIAS = {0: 2.5, 7: -1.0, 13: float("-inf"), 39: 1.0}
ALLOWED = frozenset({0, 7, 13, 20, 31, 32, 33, 39})

COMBINATIONS = {
    "plain": Row(),
    "cold": Row(temperature=0.4),
    "hot": Row(temperature=1.7),
    "top_k": Row(top_k=7),
    "top_k_1": Row(top_k=1),
    "top_k_all": Row(top_k=1000),
    "top_p": Row(top_p=0.8),
    "min_p": Row(min_p=0.1),
    "top_k_top_p": Row(top_k=12, top_p=0.75),
    "top_k_top_p_min_p": Row(temperature=1.3, top_k=20, top_p=0.9, min_p=0.08),
    "presence": Row(presence=1.5, counts=COUNTS),
    "frequency": Row(frequency=-0.3, counts=COUNTS),
    "repetition": Row(repetition=1.6, counts=COUNTS),
    "penalties": Row(presence=0.5, frequency=0.4, repetition=1.2, counts=COUNTS),
    "bias": Row(bias=BIAS),
    "all": Row(0.8, 25, 0.92, 0.01, 0.5, 0.2, 1.1, COUNTS, BIAS),
    "mask": Row(allowed=ALLOWED),
    "mask_top_k_top_p": Row(top_k=25, top_p=0.9, allowed=ALLOWED),  # more than are allowed
    "mask_all": Row(0.8, 5, 0.92, 0.01, 0.5, 0.2, 1.1, COUNTS, BIAS, allowed=ALLOWED),
}

# the sampler's configs: blocks small enough that a test's vocabulary spans several
SetBlocks = Callable[..., None]


@pytest.fixture
def set_blocks(monkeypatch: pytest.MonkeyPatch) -> SetBlocks:
    """Launch with other numbers of ids a block and of blocks a program of the search."""

    def set_blocks(block: int, span: int = 2) -> None:
        configs = {"sample": {"BLOCK": block}, "sample_search": {"SPAN": span}}

        def launch_config(op: str, **facts: int) -> dict[str, Any]:
            return {**configs[op], "num_warps": 4}

        monkeypatch.setattr(sampling_triton, "launch_config", launch_config)

    return set_blocks


@pytest.fixture(autouse=True)
def _blocks_are_small(set_blocks: SetBlocks) -> None:
    if INTERPRETED:
        set_blocks(32)


def make_logits(num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))


def frequencies(logits: Tensor, row: Row, num_draws: int) -> FloatArray:
    """How often each id is drawn over consecutive positions."""
    batch = make_batch([row], logits.shape[0])
    counted = np.zeros(logits.shape[0])
    chunk = 20_000
    for start in range(0, num_draws, chunk):
        size = min(chunk, num_draws - start)
        repeated = replace(
            batch,
            **{
                name: getattr(batch, name)
                .expand(size, *getattr(batch, name).shape[1:])
                .contiguous()
                for name in batch.__slots__
                if isinstance(getattr(batch, name), Tensor) and name != "output_counts"
            },
        )
        repeated = replace(repeated, positions=torch.arange(start, start + size))
        ids = sample(logits.expand(size, -1), repeated).token_ids
        counted += np.bincount(ids.numpy(), minlength=counted.size)
    return counted


def chi_square(counted: FloatArray, distribution: FloatArray) -> float:
    """The p-value of the counts, 0 if one is impossible; ids expected under 5 times are pooled."""
    if counted[distribution == 0].sum() > 0:
        return 0.0
    expected = distribution * counted.sum()
    rare = expected < 5
    observed = np.append(counted[~rare], counted[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    if observed.size == 1:
        return 1.0
    return float(scipy.stats.chisquare(observed, expected).pvalue)


if not INTERPRETED:

    @pytest.mark.parametrize("name", COMBINATIONS)
    def test_draws_follow_the_exact_distribution(name: str) -> None:
        logits = make_logits(1, VOCAB_SIZE, seed=1)[0]
        row = replace(COMBINATIONS[name], seed=1234)
        counted = frequencies(logits, row, NUM_DRAWS)
        assert chi_square(counted, probabilities(logits, row, VOCAB_SIZE)) > ALPHA

    @pytest.mark.parametrize(
        ("right", "wrong"),
        [
            (Row(), Row(temperature=1.03)),
            (Row(top_k=7), Row(top_k=8)),
            (Row(top_p=0.8), Row(top_p=0.85)),
            (Row(min_p=0.05), Row(min_p=0.1)),
            (Row(presence=0.5, counts=COUNTS), Row(presence=0.4, counts=COUNTS)),
            (Row(frequency=0.2, counts=COUNTS), Row(presence=0.2, counts=COUNTS)),
            (Row(repetition=1.2, counts=COUNTS), Row(repetition=1.1, counts=COUNTS)),
            (Row(bias={0: 5.0}), Row(bias={0: 4.9})),
        ],
    )
    def test_a_slightly_wrong_distribution_fails(right: Row, wrong: Row) -> None:
        logits = make_logits(1, VOCAB_SIZE, seed=1)[0]
        counted = frequencies(logits, replace(right, seed=99), NUM_DRAWS)
        assert chi_square(counted, probabilities(logits, wrong, VOCAB_SIZE)) < ALPHA


def check_every_draw(logits: Tensor, rows: list[Row], vocab_size: int, device: str) -> None:
    """Each token is the one the exact distribution gives for its Philox number."""
    actual = sample(logits.to(device), make_batch(rows, vocab_size, device=device)).token_ids
    numbers = uniforms(
        torch.tensor([row.seed for row in rows]), torch.tensor([row.position for row in rows])
    )
    num_decided = 0
    for index, row in enumerate(rows):
        expected, nearness = draw(probabilities(logits[index], row, vocab_size), numbers[index])
        if nearness > 1e-6:  # nearer, fp32 weights may fall on the other side
            num_decided += 1
            assert int(actual[index]) == expected, row
    assert num_decided >= 0.9 * len(rows)


@pytest.mark.parametrize("device", DEVICES)
def test_every_draw_inverts_the_exact_cumulative_distribution(device: str) -> None:
    rounds = 1 if INTERPRETED else 20
    rows = [
        replace(row, seed=index * 1_000_003 - 7, position=turn)
        for turn in range(rounds)
        for index, row in enumerate(COMBINATIONS.values())
    ]
    check_every_draw(make_logits(len(rows), VOCAB_SIZE, seed=2), rows, VOCAB_SIZE, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "row", [Row(top_p=0.9), Row(top_k=5000), Row(top_k=200, top_p=0.5), Row(min_p=0.3), Row()]
)
@pytest.mark.parametrize("ties", [False, True])
def test_flat_rows_of_a_large_vocabulary(
    device: str, row: Row, ties: bool, set_blocks: SetBlocks
) -> None:
    """Cuts lie beyond any bounded set of candidates, and the vocabulary spans several blocks."""
    vocab_size = 9001
    if INTERPRETED:
        set_blocks(4096)
    logits = 0.2 * make_logits(1, vocab_size, seed=3)
    if ties:
        logits = (logits * 3).round() / 3  # more than 1000 tokens share a logit
    rows = [replace(row, seed=5, position=77)]
    check_every_draw(logits, rows, vocab_size, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    vocab_size = 75 if INTERPRETED else 5003
    rows = [replace(row, seed=index) for index, row in enumerate(COMBINATIONS.values())]
    rows += [Row(temperature=0.0), Row(temperature=0.0, counts=COUNTS, repetition=2.0)]
    if INTERPRETED:
        rows = rows[8:9] + rows[-3:]
    logits = make_logits(len(rows), vocab_size, seed=4).to(device)
    whole = sample(logits, make_batch(rows, vocab_size, num_logprobs=3, device=device))
    for index, row in enumerate(rows):
        alone = make_batch([row], vocab_size, num_logprobs=3, device=device)
        assert_same(sample(logits[index : index + 1], alone), whole, index)


def assert_same(alone: Sampled, whole: Sampled, index: int) -> None:
    for name in Sampled.__slots__:
        assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[index]), name


@pytest.mark.parametrize("device", DEVICES)
def test_seed_and_position_decide(device: str) -> None:
    logits = torch.zeros(4, 1000, device=device)
    rows = [Row(seed=1), Row(seed=1), Row(seed=1, position=1), Row(seed=2)]
    ids = sample(logits, make_batch(rows, 1000, device=device)).token_ids.tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_head_padding_is_never_seen(device: str, temperature: float) -> None:
    logits = make_logits(3, 70, seed=5)
    logits[:, 50:] = 1e9
    rows = [Row(temperature, seed=1), Row(temperature, top_k=3), Row(temperature, top_p=0.5)]
    drawn = sample(logits.to(device), make_batch(rows, 50, num_logprobs=4, device=device))
    clean = sample(logits[:, :50].to(device), make_batch(rows, 50, num_logprobs=4, device=device))
    for index in range(3):
        assert_same(row_of(drawn, index), clean, index)


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_lowest_id_among_equals(device: str, set_blocks: SetBlocks) -> None:
    if INTERPRETED:
        set_blocks(512)  # 4096 and 4999 in different blocks
    logits = torch.zeros(3, 5000)
    logits[0, [17, 18, 4999]] = 3.0
    logits[1, [4096, 4999]] = 3.0
    for dtype in (torch.float32, torch.float16):
        batch = make_batch([Row(temperature=0.0)] * 3, 5000, device=device)
        ids = sample(logits.to(device, dtype), batch).token_ids
        assert ids.tolist() == [17, 4096, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_minus_zero_is_zero(device: str) -> None:
    logits = torch.full((5, 40), -3.0)
    logits[:, [5, 37]] = torch.tensor([-0.0, 0.0])
    rows = [Row(top_k=1, position=position) for position in range(4)] + [Row(0.0)]
    ids = sample(logits.to(device), make_batch(rows, 40, device=device)).token_ids.tolist()
    assert set(ids[:4]) == {5, 37}
    assert ids[4] == 5


@pytest.mark.parametrize("device", DEVICES)
def test_rare_tokens_among_many_are_drawn(device: str, set_blocks: SetBlocks) -> None:
    """Each of 3000 tokens weighs exp(-17) of the last one; the draw still tells them apart."""
    if INTERPRETED:
        set_blocks(512)
    logits = torch.full((1, 3001), -17.0)
    logits[0, 3000] = 0.0
    numbers = uniforms(torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000))
    positions = np.flatnonzero(numbers < 3000 * np.exp(-17.0))[:2]
    rows = [Row(position=int(position)) for position in positions]
    ids = sample(logits.expand(2, -1).to(device), make_batch(rows, 3001, device=device)).token_ids
    exact = probabilities(logits[0], Row(), 3001)
    expected = [draw(exact, numbers[position]) for position in positions]
    assert ids.tolist() == [token_id for token_id, _ in expected]
    assert max(ids.tolist()) < 3000
    assert min(nearness for _, nearness in expected) > 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_top_p_shares_what_top_k_left_to_the_last_token(device: str) -> None:
    """Of 1 + 0.9, whichever block the second lies in, one token holds less than 0.6."""
    logits = torch.full((4, 70), -1.0)
    logits[:, [3, 68]] = torch.tensor([0.0, np.log(0.9)], dtype=torch.float32)
    rows = [Row(top_k=2, top_p=0.6, position=position) for position in range(4)]
    ids = sample(logits.to(device), make_batch(rows, 70, device=device)).token_ids
    assert set(ids.tolist()) == {3, 68}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities in the interpreter
@pytest.mark.parametrize("device", DEVICES[-1:])  # the torch body promises nothing here
@pytest.mark.parametrize("row", [Row(), Row(top_k=3, top_p=0.5, min_p=0.2), Row(1e-45)])
def test_a_logit_adjusted_to_infinity_and_no_heat_draw_the_largest(device: str, row: Row) -> None:
    logits = make_logits(1, 40, seed=17)
    if row.temperature == 1:
        logits[0, 33] = 3e38
        row = replace(row, counts={33: 1}, repetition=0.1)
    ids = sample(logits.to(device), make_batch([row], 40, device=device)).token_ids
    assert ids.tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [Row(top_k=2), Row(top_p=0.3), Row(top_p=0.0)])
def test_tokens_tied_with_the_last_one_kept_are_kept(device: str, row: Row) -> None:
    logits = torch.full((12, 30), -1.0)
    logits[:, [4, 9, 23]] = 2.0
    rows = [replace(row, position=position) for position in range(12)]
    ids = sample(logits.to(device), make_batch(rows, 30, device=device)).token_ids
    assert set(ids.tolist()) == {4, 9, 23}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low_bits", [1, 2, 3])
def test_logits_one_bit_apart_are_not_tied(device: str, low_bits: int) -> None:
    bits = torch.full((6, 5), 0x40000000 + low_bits - 1, dtype=torch.int32)
    bits[:, 3] += 1
    rows = [Row(top_k=1, position=position) for position in range(6)]
    batch = make_batch(rows, 5, device=device)
    assert sample(bits.view(torch.float32).to(device), batch).token_ids.tolist() == [3] * 6


@pytest.mark.parametrize("device", DEVICES)
def test_a_filter_always_leaves_the_largest(device: str) -> None:
    logits = make_logits(3, 30, seed=6)
    rows = [Row(top_p=0.0), Row(min_p=1.0), Row(temperature=1e-6)]
    ids = sample(logits.to(device), make_batch(rows, 30, device=device)).token_ids
    assert ids.tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_penalties_by_hand(device: str) -> None:
    """OpenAI's formula after the repetition penalty, each value worked out on paper.

    logits   2.0   -1.0   0.5   3.0        repetition 2, frequency 0.5, presence 0.25
    count    2      1     0     4
    /2 or *2 1.0   -2.0   0.5   1.5
    result  -0.25  -2.75  0.5  -0.75       1 - 2*0.5 - 0.25;  -2 - 0.5 - 0.25;  -;  1.5 - 2 - 0.25
    """
    by_hand = [-0.25, -2.75, 0.5, -0.75]
    penalties = Row(0.0, presence=0.25, frequency=0.5, repetition=2.0, counts={0: 2, 1: 1, 3: 4})
    for token_id, value in enumerate(by_hand):
        # token 4, never generated, wins exactly when its logit is above the adjusted one
        others = {other: float("-inf") for other in range(4) if other != token_id}
        rows = [replace(penalties, bias=others)] * 2
        logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, value + delta] for delta in (-1e-3, 1e-3)])
        ids = sample(logits.to(device), make_batch(rows, 5, device=device)).token_ids
        assert ids.tolist() == [token_id, 4]


@pytest.mark.parametrize("device", DEVICES)
def test_bias_comes_before_the_repetition_penalty(device: str) -> None:
    """(1 + 3) / 2 = 2, not 1 / 2 + 3 = 3.5."""
    row = Row(0.0, repetition=2.0, counts={0: 1}, bias={0: 3.0})
    logits = torch.tensor([[1.0, 1.999], [1.0, 2.001]])
    ids = sample(logits.to(device), make_batch([row, row], 2, device=device)).token_ids
    assert ids.tolist() == [0, 1]


@pytest.mark.parametrize("device", DEVICES)
def test_bias_on_head_padding_does_nothing(device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]], device=device)
    batch = make_batch([Row(0.0, bias={3: 100.0, 2: 0.5})], 4, device=device)
    assert sample(logits, replace(batch, vocab_size=3)).token_ids.tolist() == [1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 20])
def test_logprobs_are_of_the_raw_logits(device: str, num_logprobs: int) -> None:
    logits = make_logits(3, 64, seed=7)
    logits[1, [5, 40, 60]] = 9.0  # ties are ranked by id
    rows = [Row(bias={2: 100.0}), Row(temperature=0.0), Row(0.3, counts=COUNTS, presence=2.0)]
    batch = make_batch(rows, 61, num_logprobs=num_logprobs, device=device)
    drawn = sample(logits.to(device), batch)
    exact = torch.log_softmax(logits[:, :61].double(), dim=1)
    assert int(drawn.token_ids[0]) == 2
    assert drawn.logprobs is not None
    chosen = exact.gather(1, drawn.token_ids.cpu().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(drawn.logprobs.cpu().double(), chosen, rtol=0, atol=2e-6)
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    ranked = exact.sort(dim=1, descending=True, stable=True)
    assert drawn.top_ids.tolist() == ranked.indices[:, :num_logprobs].tolist()
    torch.testing.assert_close(
        drawn.top_logprobs.cpu().double(), ranked.values[:, :num_logprobs], rtol=0, atol=2e-6
    )


KINDS = {
    "greedy": [Row(0.0)] * 3,
    "drawn": [Row(seed=1), Row(seed=2), Row(0.6, seed=3)],
    "filtered": [COMBINATIONS["top_k_top_p_min_p"], Row(top_p=0.9), Row(min_p=0.1, top_k=9)],
    "penalties": [COMBINATIONS["penalties"], COMBINATIONS["bias"], COMBINATIONS["all"]],
    "mixed": [Row(0.0, presence=1.0, counts=COUNTS), Row(seed=4), Row(0.7, top_p=0.8, bias=BIAS)],
}
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities in the interpreter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_row_that_is_not_finite_draws_minus_one_and_leaves_the_others_alone(
    device: str, kind: str, value: float
) -> None:
    """One such logit is enough, in any column, a banned one too; the others keep their bits."""
    vocab_size = 70
    finite, first, last = KINDS[kind]
    rows = [first, finite, last, first, last, finite, first]
    columns = {0: 0, 2: 13, 3: 31, 4: 32, 6: vocab_size - 1}  # of row 6: the last logit of all
    logits = make_logits(len(rows), vocab_size, seed=8)
    clean = logits.clone()
    for index, column in columns.items():
        logits[index, column] = value
    whole = sample(logits.to(device), make_batch(rows, vocab_size, num_logprobs=3, device=device))
    others = [1, 5]
    batch = make_batch([rows[index] for index in others], vocab_size, num_logprobs=3, device=device)
    expected = sample(clean[others].to(device), batch)
    assert [int(whole.token_ids[index]) for index in columns] == [-1] * len(columns)
    for position, index in enumerate(others):
        assert_same(row_of(expected, position), whole, index)


if not INTERPRETED:

    @pytest.mark.parametrize("device", DEVICES)
    def test_no_token_of_many_neighbours_changes(device: str) -> None:
        rows = [
            replace(row, seed=index, position=turn)
            for turn in range(100)
            for index, row in enumerate(COMBINATIONS.values())
        ]
        logits = make_logits(len(rows), 300, seed=23)
        batch = make_batch(rows, 300, device=device)
        expected = sample(logits.to(device), batch).token_ids.tolist()
        logits[777, 299] = float("inf")
        expected[777] = -1
        assert sample(logits.to(device), batch).token_ids.tolist() == expected


def row_of(drawn: Sampled, index: int) -> Sampled:
    return Sampled(*(getattr(drawn, name)[index : index + 1] for name in Sampled.__slots__))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["greedy", "mixed"])
def test_nothing_in_the_head_padding_marks_a_row(device: str, kind: str) -> None:
    logits = make_logits(3, 76, seed=20)
    logits[:, 70:73] = torch.tensor(NOT_FINITE)
    batch = make_batch(KINDS[kind], 70, num_logprobs=2, device=device)
    drawn = sample(logits.to(device), batch)
    clean = sample(logits[:, :70].contiguous().to(device), batch)
    assert min(drawn.token_ids.tolist()) >= 0
    for index in range(3):
        assert_same(row_of(clean, index), drawn, index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16])
def test_large_finite_logits_mark_no_row(device: str, dtype: torch.dtype) -> None:
    """Sums of these overflow, with either sign, in a row and over the rows."""
    largest = torch.finfo(dtype).max
    logits = torch.full((4, 70), largest, dtype=dtype)
    logits[1] = -largest
    logits[2] = min(1e30, largest)
    logits[3, 40] = float("nan")
    batch = make_batch([Row(seed=1)] * 4, 70, num_logprobs=1, device=device)
    drawn = sample(logits.to(device), batch)
    flat = sample(
        torch.zeros(3, 70, device=device), make_batch([Row(seed=1)] * 3, 70, device=device)
    )
    assert drawn.token_ids.tolist() == [*flat.token_ids.tolist(), -1]
    assert drawn.logprobs is not None
    torch.testing.assert_close(drawn.logprobs[:3].cpu(), torch.full((3,), -np.log(70)).float())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of infinities in the interpreter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_halves_that_are_not_finite_mark_their_rows(
    device: str, dtype: torch.dtype, temperature: float
) -> None:
    logits = make_logits(4, 70, seed=21).to(dtype)
    logits[[0, 1, 3], [69, 5, 0]] = torch.tensor(NOT_FINITE, dtype=dtype)
    batch = make_batch([Row(temperature)] * 4, 70, device=device)
    ids = sample(logits.to(device), batch).token_ids.tolist()
    assert ids[:2] == [-1, -1] and ids[2] >= 0 and ids[3] == -1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_of_every_token_marks_no_row(device: str, temperature: float) -> None:
    row = Row(temperature, bias=dict.fromkeys(range(40), float("-inf")))
    logits = make_logits(1, 40, seed=22).to(device)
    assert 0 <= int(sample(logits, make_batch([row], 40, device=device)).token_ids[0]) < 40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [Row(0.0), Row(), Row(top_k=3), Row(min_p=0.5), Row(top_p=0.2)])
def test_a_mask_allows_what_it_names_whatever_the_logits(device: str, row: Row) -> None:
    """Also if only the smallest logit is left, next to a row that has no mask."""
    logits = make_logits(3, 2 * VOCAB_SIZE, seed=30)
    least = [int(logits[0].argmin()), int(logits[2].argmin())]
    rows = [
        replace(row, allowed=frozenset(least[:1])),
        Row(0.0),
        replace(row, allowed=frozenset(least[1:]), bias={least[1]: -100.0, least[1] ^ 1: 100.0}),
    ]
    ids = sample(logits.to(device), make_batch(rows, 2 * VOCAB_SIZE, device=device)).token_ids
    assert ids.tolist() == [least[0], int(logits[1].argmax()), least[1]]


@pytest.mark.parametrize("device", DEVICES)
def test_log_probabilities_do_not_see_a_mask(device: str) -> None:
    logits = make_logits(1, VOCAB_SIZE, seed=31)
    row = Row(0.0, allowed=frozenset({int(logits[0].argmin())}))
    drawn = sample(logits.to(device), make_batch([row], VOCAB_SIZE, num_logprobs=3, device=device))
    expected = logits[0].log_softmax(0)
    assert drawn.logprobs is not None and drawn.top_ids is not None
    torch.testing.assert_close(drawn.logprobs[0].cpu(), expected.min())
    assert drawn.top_ids[0].tolist() == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [Row(0.0), Row(), Row(top_k=3, top_p=0.5)])
def test_a_mask_that_allows_nothing_draws_some_id(device: str, row: Row) -> None:
    rows = [replace(row, allowed=frozenset()), Row(0.0)]
    logits = make_logits(2, VOCAB_SIZE, seed=32)
    ids = sample(logits.to(device), make_batch(rows, VOCAB_SIZE, device=device)).token_ids
    assert 0 <= int(ids[0]) < VOCAB_SIZE and int(ids[1]) == int(logits[1].argmax())


@pytest.mark.parametrize("device", DEVICES)
def test_the_logits_are_not_modified(device: str) -> None:
    logits = make_logits(2, 64, seed=9).to(device)
    before = logits.clone()
    rows = [replace(COMBINATIONS["all"], top_k=5), Row(temperature=0.0)]
    sample(logits, make_batch(rows, 64, num_logprobs=2, device=device))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_draw_nothing(device: str) -> None:
    batch = make_batch([Row()], 64, num_logprobs=2, device=device)
    empty = {name: getattr(batch, name)[:0] for name in ("temperature", "seeds", "positions")}
    drawn = sample(torch.empty((0, 64), device=device), replace(batch, **empty))
    assert drawn.top_ids is not None
    assert (drawn.token_ids.shape, drawn.top_ids.shape) == ((0,), (0, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (Row(0.0), {"all_greedy": False, "any_filter": True}),
        (Row(), {"any_filter": True}),
        (Row(), {"any_filter": True, "any_top_k": False}),
        (Row(min_p=0.1), {"any_top_k": True, "any_top_p": True}),
        (Row(top_k=9), {"any_top_p": True}),
        (Row(top_p=0.7), {"any_top_k": True}),
    ],
)
def test_a_flag_that_no_row_needs_changes_no_bit(
    device: str, row: Row, unused: dict[str, bool]
) -> None:
    """As a CUDA graph is captured: with the flags of its kind, whatever the rows turn out to be."""
    num_rows = 2 if INTERPRETED else 64
    rows = [replace(row, seed=index) for index in range(num_rows)]
    logits = make_logits(num_rows, 60, seed=10).to(device)
    batch = make_batch(rows, 60, num_logprobs=2, device=device)
    exact = replace(batch, any_top_k=row.top_k > 0, any_top_p=row.top_p < 1)
    expected, actual = sample(logits, exact), sample(logits, replace(exact, **unused))
    for name in Sampled.__slots__:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("greedy", [False, True])
def test_a_cuda_graph_replays_with_new_rows(greedy: bool) -> None:
    """Captured for plain rows; then the same tensors hold other logits and parameters."""
    vocab_size = 3000
    plain = make_batch([Row(1.0 - greedy, counts=COUNTS)] * 15, vocab_size, device="cuda")
    batch = replace(plain, any_filter=not greedy, num_logprobs=2)
    logits = make_logits(15, vocab_size, seed=19).cuda()
    sample(logits, batch)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(logits, batch)
    rows = [replace(row, position=9, bias={}) for row in list(COMBINATIONS.values())[:15]]
    if greedy:
        rows = [replace(row, temperature=0.0) for row in rows]
    for turn in range(3):
        logits.copy_(make_logits(15, vocab_size, seed=20 + turn))
        others = make_batch(rows[turn:] + rows[:turn], vocab_size, device="cuda")
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions"):
            getattr(batch, name).copy_(getattr(others, name))
        graph.replay()
        expected = sample(logits, replace(batch, any_filter=True))
        for name in Sampled.__slots__:
            assert torch.equal(getattr(drawn, name), getattr(expected, name)), name
    for index, value in enumerate(NOT_FINITE):
        logits[5 * index, 1000 * index] = value
    graph.replay()
    for index in range(15):
        if index % 5 == 0:
            assert int(drawn.token_ids[index]) == -1
        else:
            assert_same(row_of(expected, index), drawn, index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [2, 64])
def test_a_row_among_copies_has_the_same_bits(device: str, size: int) -> None:
    size = min(size, 3) if INTERPRETED else size
    row = replace(COMBINATIONS["all"], seed=8)
    logits = make_logits(1, 50, seed=11).to(device)
    alone = sample(logits, make_batch([row], 50, num_logprobs=2, device=device))
    batch = make_batch([row] * size, 50, num_logprobs=2, device=device)
    whole = sample(logits.expand(size, -1).contiguous(), batch)
    for index in range(size):
        assert_same(alone, whole, index)


@pytest.mark.parametrize("device", DEVICES)
def test_how_a_row_is_cut_into_blocks_changes_no_token(device: str, set_blocks: SetBlocks) -> None:
    names = ["all", "top_k_top_p"] if INTERPRETED else list(COMBINATIONS)
    rows = [replace(COMBINATIONS[name], seed=3) for name in names]
    logits = make_logits(len(rows), 150, seed=12).to(device)
    drawn = []
    for block, span in [(16, 3), (64, 1), (256, 2)]:
        set_blocks(block, span)
        batch = make_batch(rows, 150, device=device)
        drawn.append(sample(logits, batch).token_ids.tolist())
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("device", DEVICES)
def test_halves_draw_as_the_same_numbers_in_fp32(device: str) -> None:
    rows = [COMBINATIONS["all"], COMBINATIONS["top_k_top_p_min_p"], Row(), Row(0.0)]
    logits = make_logits(len(rows), 70, seed=13).to(device, HALF)
    batch = make_batch(rows, 60, num_logprobs=3, device=device)
    halves, floats = sample(logits, batch), sample(logits.float(), batch)
    for name in Sampled.__slots__:
        assert torch.equal(getattr(halves, name), getattr(floats, name)), name


@pytest.mark.parametrize("device", DEVICES)
def test_banned_tokens_are_never_drawn(device: str) -> None:
    """Also where a filter asks for more tokens than are left, in whole blocks of them."""
    allowed = [3, 68]
    bias = {id_: float("-inf") for id_ in range(70) if id_ not in allowed}
    kinds = [Row(), Row(top_k=30), Row(top_p=0.99, top_k=30)] * 2
    rows = [replace(row, bias=bias, position=position) for position, row in enumerate(kinds)]
    ids = sample(torch.zeros(6, 70, device=device), make_batch(rows, 70, device=device)).token_ids
    assert set(ids.tolist()) == set(allowed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_bias", [1, 15, 16, 17, 40])
def test_any_number_of_biases(device: str, num_bias: int) -> None:
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(num_bias))[:num_bias].tolist()
    for last in {ids[0], ids[num_bias // 2], ids[-1]}:
        row = Row(0.0, bias={id_: 20.0 + (id_ == last) for id_ in ids})
        logits = make_logits(1, 90, seed=14).clamp(-0.4, 0.4).to(device)
        assert sample(logits, make_batch([row], 90, device=device)).token_ids.tolist() == [last]


@pytest.mark.parametrize("device", DEVICES)
def test_more_logprobs_than_tokens(device: str) -> None:
    logits = make_logits(2, 5, seed=15)
    drawn = sample(
        logits.to(device), make_batch([Row(), Row(0.0)], 3, num_logprobs=6, device=device)
    )
    assert drawn.top_ids is not None and drawn.top_logprobs is not None
    ranking = logits[:, :3].argsort(dim=1, descending=True).tolist()
    assert drawn.top_ids.tolist() == [ids + [0] * 3 for ids in ranking]
    assert drawn.top_logprobs[:, 3:].tolist() == [[float("-inf")] * 3] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_padding_row_leaves_the_others_alone(device: str) -> None:
    """A padding row of a CUDA graph has no row of counts, and its logits may be anything."""
    rows = [Row(0.7, top_p=0.9, presence=1.0, counts=COUNTS, seed=4), Row(counts={1: 1})]
    logits = make_logits(2, 64, seed=16)
    logits[1] = float("nan")
    batch = make_batch(rows, 64, num_logprobs=1, device=device)
    assert batch.rows is not None
    padded = replace(batch, rows=torch.tensor([int(batch.rows[0]), -1], device=device))
    whole = sample(logits.to(device), padded)
    assert int(whole.token_ids[1]) == -1
    assert_same(whole, sample(logits.to(device), batch), 0)


@pytest.mark.parametrize("device", DEVICES[-1:])  # the torch body knows no padding
def test_a_padding_row_reads_no_counts(device: str) -> None:
    logits = make_logits(1, 40, seed=18)
    best = int(logits.argmax())
    batch = make_batch([Row(0.0, presence=100.0, counts={1: 1})], 40, device=device)
    memory = torch.zeros((3, 50), dtype=torch.int32, device=device)
    memory[0, best] = 1  # lies before the table
    padded = replace(batch, output_counts=memory[1:], rows=torch.tensor([-1], device=device))
    assert sample(logits.to(device), padded).token_ids.tolist() == [best]


@pytest.mark.parametrize("device", DEVICES)
def test_count_tokens(device: str) -> None:
    memory = torch.full((5, 5), 7, dtype=torch.int32, device=device)
    counts = memory[1:4]
    counts.zero_()
    count_tokens(counts, *(torch.tensor(ids, device=device) for ids in ([0, 2, -1], [4, 1, 3])))
    count_tokens(counts, *(torch.tensor(ids, device=device) for ids in ([-1, 2], [0, 1])))
    count_tokens(counts, *(torch.tensor(ids, device=device) for ids in ([0, 1, 2], [-1, -1, -1])))
    none = torch.empty(0, dtype=torch.int64, device=device)
    count_tokens(counts, none, none)
    assert counts.tolist() == [[0, 0, 0, 0, 1], [0] * 5, [0, 2, 0, 0, 0]]
    assert memory[[0, 4]].tolist() == [[7] * 5] * 2  # canaries


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_are_counted(device: str) -> None:
    rows, token_ids = torch.arange(300), torch.arange(300) % 7
    counts = torch.zeros((300, 7), dtype=torch.int32, device=device)
    count_tokens(counts, rows.to(device), token_ids.to(device))
    assert torch.equal(counts.cpu(), torch.nn.functional.one_hot(token_ids, 7).int())
