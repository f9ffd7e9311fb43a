"""The prefix cache: what is found, what is kept, what is forgotten, and that no token changes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch

from runtime import Engine, FinishReason, SamplingParams
from runtime.blocks import PagePool, Prefix, extend_key, root_key
from runtime.request import Sequence
from tests.runtime.engines import TINY, chats, make_engine

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


# -- the pool --------------------------------------------------------------------------------------


def pages_of(token_ids: Seq[int], page_size: int = 2, namespace: str = "") -> list[Prefix]:
    prefixes: list[Prefix] = []
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        parent = prefixes[-1].key if prefixes else root_key("m", namespace)
        prefixes.append(extend_key(parent, token_ids[start : start + page_size]))
    return prefixes


def publish(pool: PagePool, prefixes: Seq[Prefix]) -> list[int]:
    page_ids = pool.allocate(len(prefixes))
    assert page_ids is not None
    for page_id, prefix in zip(page_ids, prefixes, strict=True):
        pool.publish(page_id, prefix)
    return page_ids


def test_a_key_stands_for_all_tokens_before_it_and_for_whose_they_are() -> None:
    first, second = pages_of([1, 2, 3, 4])
    assert pages_of([9, 2, 3, 4])[1].tokens == second.tokens
    keys = {
        pages_of(tokens, namespace=namespace)[1].key
        for tokens in ([1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 5], [1, 2, 4, 3], [2, 1, 3, 4])
        for namespace in ("", "a", "b")
    }
    assert len(keys) == 15
    assert pages_of([1, 2, 3, 4, 5])[:2] == [first, second]
    assert root_key("ab", "c") != root_key("a", "bc")


def test_pages_are_found_while_used_and_after_until_their_room_is_needed() -> None:
    pool = PagePool(4)
    prefixes = pages_of([1, 2, 3, 4, 5, 6])
    page_ids = publish(pool, prefixes)
    assert [pool.find(prefix) for prefix in prefixes] == page_ids
    pool.free(page_ids)
    pool.check([])
    assert (pool.num_free, pool.num_cached) == (4, 3)
    taken = pool.allocate(2)  # the page that was never used, and the end of the prefix
    assert taken is not None
    assert [pool.find(prefix) for prefix in prefixes] == [*page_ids[:2], None]
    pool.check([taken])
    pool.share(page_ids[:1])
    assert pool.num_free == 1
    rest = pool.allocate(1)
    assert rest == page_ids[1:2]
    assert pool.allocate(1) is None
    assert pool.find(prefixes[0]) == page_ids[0]
    pool.check([taken, rest, page_ids[:1]])


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    pool = PagePool(3)
    prefixes = [pages_of([i, i])[0] for i in range(3)]
    page_ids = [publish(pool, [prefix])[0] for prefix in prefixes]
    for index in (1, 0, 2):
        pool.free([page_ids[index]])
    pool.share([page_ids[1]])  # used again
    pool.free([page_ids[1]])
    for gone in (0, 2, 1):
        assert pool.find(prefixes[gone]) is not None
        assert pool.allocate(1) == [page_ids[gone]]
        assert pool.find(prefixes[gone]) is None


def test_the_tokens_are_compared_not_only_the_key() -> None:
    pool = PagePool(1)
    [prefix] = pages_of([1, 2])
    publish(pool, [prefix])
    assert pool.find(Prefix(prefix.key, extend_key(b"", [1, 3]).tokens)) is None


def test_forgotten_pages_stay_with_their_users() -> None:
    pool = PagePool(2)
    used, idle = pages_of([1, 2, 3, 4])
    page_ids = publish(pool, [used, idle])
    pool.free(page_ids[1:])
    pool.forget(page_ids)
    pool.check([page_ids[:1]])
    assert pool.find(used) is None and pool.find(idle) is None
    assert pool.allocate(2) is None
    pool.free(page_ids[:1])
    assert pool.allocate(2) is not None


# -- the engine ------------------------------------------------------------------------------------


class Watched:
    """An engine that tells what each sequence took from the cache."""

    def __init__(self, **options: Any) -> None:
        self.engine: Engine = make_engine(TINY, **options)
        self.started: list[Sequence] = []
        self.engine.on_start = self.started.extend

    def run(
        self, prompt: Seq[int], params: SamplingParams = GREEDY, **options: Any
    ) -> tuple[list[int], int]:
        """(new tokens, tokens that were cached)"""
        seq_id = self.engine.add(prompt, params, **options)
        token_ids: list[int] = []
        while self.engine.has_work:
            for event in self.engine.step():
                assert event.seq_id == seq_id and event.token_id is not None
                token_ids.append(event.token_id)
        self.engine.scheduler.check()
        return token_ids, self.started[-1].num_cached


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    tokenizer = make_engine(TINY).tokenizer
    assert tokenizer is not None
    ids = [token for chat in chats() for token in tokenizer.encode_chat(chat).token_ids]
    return ids[:83]


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_prompt_seen_before_gives_the_same_tokens_and_is_not_computed_again(
    prompt: list[int], page_size: int, run_ahead: int
) -> None:
    watched = Watched(page_size=page_size, run_ahead=run_ahead)
    plain, none = Watched(page_size=page_size, prefix_cache=False).run(prompt)
    assert none == 0
    full = (len(prompt) - 2) // page_size * page_size
    for expected in (0, full, full):
        assert watched.run(prompt) == (plain, expected)
    longer = prompt + plain[:9] + [7, 8, 9]  # a chat goes on: the answer is in the cache too
    tokens, num_cached = watched.run(longer)
    assert num_cached == (len(prompt) + 9) // page_size * page_size
    assert tokens == Watched(prefix_cache=False).run(longer)[0]
    other = [*prompt[:40], 5, *prompt[41:]]
    assert watched.run(other) == (
        Watched(prefix_cache=False).run(other)[0],
        40 // page_size * page_size,
    )


def test_the_last_two_tokens_are_always_computed(prompt: list[int]) -> None:
    watched = Watched(page_size=4)
    expected, _ = watched.run(prompt[:32])
    assert watched.run(prompt[:32]) == (expected, 28)
    assert watched.run(prompt[:33])[1] == 28
    assert watched.run(prompt[:34])[1] == 32


def test_namespaces_share_nothing(prompt: list[int]) -> None:
    watched = Watched()
    expected, _ = watched.run(prompt, namespace="alice")
    assert watched.run(prompt, namespace="bob") == (expected, 0)
    assert watched.run(prompt) == (expected, 0)
    assert watched.run(prompt, namespace="alice") == (expected, 80)


def test_a_cache_that_overflows_forgets_and_stays_right(prompt: list[int]) -> None:
    watched = Watched(max_model_len=96, max_num_seqs=1, page_size=4)
    expected, _ = watched.run(prompt)
    for start in range(5, 10):
        watched.run([start, *prompt[1:]])
    assert watched.run(prompt) == (expected, 0)
    assert watched.engine.stats()["num_free_pages"] == watched.engine.info.num_pages


def test_neighbours_that_begin_alike_do_not_disturb_each_other(prompt: list[int]) -> None:
    plain = Watched(prefix_cache=False)
    prompts = [[*prompt[: 20 + i], 30 + i, 40 + i] for i in range(12)]
    expected = [plain.run(one)[0] for one in prompts]
    watched = Watched(max_num_seqs=4)
    engine = watched.engine
    sequences = {engine.add(one, GREEDY): i for i, one in enumerate(prompts)}
    received: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None
            received[sequences[event.seq_id]].append(event.token_id)
        engine.scheduler.check()
    assert received == expected
    assert sum(seq.num_cached for seq in watched.started) > 0


def test_pages_of_a_row_that_is_not_finite_are_never_found_again(prompt: list[int]) -> None:
    watched = Watched()
    engine = watched.engine
    expected, _ = watched.run(prompt)
    seq_id = engine.add(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
    engine.step()
    [running] = engine.scheduler.running
    for layer in engine.runner.caches:  # type: ignore[attr-defined]
        for cache in layer.values():
            cache[running.block_table[1]] = torch.nan
    [event] = engine.step()
    assert (event.seq_id, event.token_id, event.finish_reason) == (
        seq_id,
        None,
        FinishReason.NOT_FINITE,
    )
    assert engine.stats()["num_free_pages"] == engine.info.num_pages
    assert watched.run(prompt) == (expected, 0)


def test_reset_cache_forgets_everything(prompt: list[int]) -> None:
    watched = Watched()
    expected, _ = watched.run(prompt)
    assert watched.engine.stats()["num_cached_pages"] > 0
    watched.engine.reset_cache()
    assert watched.engine.stats()["num_cached_pages"] == 0
    assert watched.run(prompt) == (expected, 0)
