"""The sampler: exact distributions, ties, determinism, penalties by hand, log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from kernels.philox import uniforms
from kernels.sampling import Sampled, count_tokens, sample
from tests.kernels.passes import DEVICES, INTERPRETED
from tests.kernels.sampling_oracle import FloatArray, Row, draw, make_batch, probabilities

VOCAB_SIZE = 40
NUM_DRAWS = 200_000
ALPHA = 1e-4  # seeds are fixed, so a test that passes once always passes
COUNTS = {3: 1, 7: 4, 11: 2, 20: 1, 39: 9}
BIAS = {0: 2.5, 7: -1.0, 13: float("-inf"), 39: 1.0}

COMBINATIONS = {
    "plain": Row(),
    "cold": Row(temperature=0.4),
    "hot": Row(temperature=1.7),
    "top_k": Row(top_k=7),
    "top_k_1": Row(top_k=1),
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
}


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
def test_flat_rows_of_a_large_vocabulary(device: str, row: Row, ties: bool) -> None:
    """Cuts lie beyond any bounded set of candidates, and the vocabulary spans several blocks."""
    vocab_size = 9001
    logits = 0.2 * make_logits(1, vocab_size, seed=3)
    if ties:
        logits = (logits * 3).round() / 3  # more than 1000 tokens share a logit
    rows = [replace(row, seed=5, position=77)]
    check_every_draw(logits, rows, vocab_size, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_the_same_bits_in_any_batch(device: str) -> None:
    vocab_size = 300 if INTERPRETED else 5003
    rows = [replace(row, seed=index) for index, row in enumerate(COMBINATIONS.values())]
    rows += [Row(temperature=0.0), Row(temperature=0.0, counts=COUNTS, repetition=2.0)]
    if INTERPRETED:
        rows = rows[6:8] + rows[-3:]
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
        assert_same(
            Sampled(*(getattr(drawn, name)[index : index + 1] for name in Sampled.__slots__)),
            clean,
            index,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_lowest_id_among_equals(device: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [17, 18, 4999]] = 3.0
    logits[1, [4096, 4999]] = 3.0
    for dtype in (torch.float32, torch.float16):
        batch = make_batch([Row(temperature=0.0)] * 3, 5000, device=device)
        ids = sample(logits.to(device, dtype), batch).token_ids
        assert ids.tolist() == [17, 4096, 0]


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


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_nan_leaves_the_others_alone(device: str) -> None:
    logits = make_logits(3, 64, seed=8)
    logits[1] = float("nan")
    rows = [replace(COMBINATIONS["all"], counts={}, bias={})] * 3
    whole = sample(logits.to(device), make_batch(rows, 64, num_logprobs=2, device=device))
    assert 0 <= int(whole.token_ids[1]) < 64
    alone = make_batch(rows[:1], 64, num_logprobs=2, device=device)
    for index in (0, 2):
        assert_same(sample(logits[index : index + 1].to(device), alone), whole, index)


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


def test_count_tokens() -> None:
    counts = torch.zeros((3, 5), dtype=torch.int32)
    count_tokens(counts, torch.tensor([0, 2]), torch.tensor([4, 1]))
    count_tokens(counts, torch.tensor([2]), torch.tensor([1]))
    assert counts.tolist() == [[0, 0, 0, 0, 1], [0] * 5, [0, 2, 0, 0, 0]]
