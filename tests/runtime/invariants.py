"""What must hold of scheduler, pool and device after every step (I1-I11), whatever happened."""

from __future__ import annotations

from array import array

from runtime.request import Sequence, SequenceStatus
from runtime.scheduler import Plan, Scheduler
from tests.runtime.canary import CanaryRunner, Origin, salt_of


class Invariants:
    """Checks one engine. ``check`` raises `AssertionError` with the number of what is broken."""

    def __init__(self, scheduler: Scheduler, runner: CanaryRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._meanings: dict[bytes, tuple[Origin, bytes]] = {}

    def check(self) -> None:
        self.check_pages()
        self.check_cache()
        self.check_sequences()

    def check_pages(self) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        num_refs = [0] * (pool.num_pages + 1)
        for seq in running:
            for page_id in seq.block_table:
                num_refs[page_id] += 1
            assert len(set(seq.block_table)) == len(seq.block_table), (
                "I2 a table names a page twice"
            )
        free, idle = set(pool._free), set(pool._idle)
        used = {page_id for page_id, count in enumerate(num_refs) if count}
        every = set(range(1, pool.num_pages + 1))
        assert free | idle | used == every, "I1 a page is nowhere"
        assert len(pool._free) + len(pool._idle) + len(used) == pool.num_pages, "I1 a page is twice"
        assert pool._num_refs == num_refs, f"I2 tables refer {num_refs}, counted {pool._num_refs}"
        assert pool.num_free == len(free) + len(idle), "I3 num_free"
        assert all(pool._num_refs[page_id] == 0 for page_id in free | idle), "I3 free but used"
        for seq in running:
            num_full = seq.num_computed // self.runner.page_size
            for page_id in seq.block_table[num_full:]:
                assert num_refs[page_id] == 1, f"I5 page {page_id} is written and shared"
                assert pool._prefixes[page_id] is None, (
                    f"I5 page {page_id} is written and published"
                )
            assert seq.num_computed < seq.max_num_tokens, (
                "I6 more is computed than can be asked for"
            )
            room = len(seq.block_table) * self.runner.page_size
            assert room >= seq.num_computed, f"I6 {seq.num_computed} tokens in {room} slots"

    def check_cache(self) -> None:
        pool, runner = self.scheduler.pool, self.runner
        published = {page_id for page_id, prefix in enumerate(pool._prefixes) if prefix is not None}
        assert published == set(pool._page_ids.values()), "I4 keys and published pages differ"
        assert len(published) == pool.num_cached, "I4 two keys for a page"
        assert published.isdisjoint(pool._free), "I4 a free page is published"
        meanings: dict[bytes, tuple[Origin, bytes]] = {}
        for page_id in published:
            prefix, origin = pool._prefixes[page_id], runner.origins[page_id]
            assert prefix is not None and origin is not None, "I4 published but never written"
            assert pool._page_ids[prefix.key] == page_id, "I4 a page has another page's key"
            assert len(runner.contents[page_id]) == runner.page_size, "I4 published but not full"
            tokens = array("i", runner.contents[page_id]).tobytes()
            assert tokens == prefix.tokens, f"I4 page {page_id} holds other tokens than its key"
            if page_id not in runner.poisoned:
                meanings[prefix.key] = (origin, tokens)
        assert len(set(meanings.values())) == len(meanings), "I4 two keys for the same contents"
        for key, meaning in meanings.items():
            assert self._meanings.get(key, meaning) == meaning, "I4 a key changed its meaning"
        self._meanings = meanings

    def check_sequences(self) -> None:
        scheduler, runner = self.scheduler, self.runner
        rows = [seq.row for seq in scheduler.running]
        assert len(set(rows)) == len(rows), f"I7 rows {rows} are shared"
        assert sorted(rows + scheduler._free_rows) == list(range(scheduler.max_num_seqs)), "I7 rows"
        assert len(rows) <= scheduler.max_num_seqs, "I8 too many run"
        lists = [*scheduler.running, *scheduler.waiting]
        assert len(lists) == len(set(map(id, lists))), "I9 a sequence is in two states"
        assert set(lists) == set(scheduler._sequences.values()), "I9 a sequence is in no state"
        for seq in scheduler.running:
            assert runner.row_owners[seq.row] == seq.seq_id, f"I7 row {seq.row} is another's"
            assert seq.seq_id in scheduler._sequences, "I9 one that ended runs"
            salt = salt_of(seq.namespace)
            for page_id in seq.block_table[: -(-seq.num_computed // runner.page_size)]:
                origin = runner.origins[page_id]
                assert origin is not None and origin[0] == salt, (
                    f"I11 page {page_id} of another namespace"
                )
        for seq in scheduler.waiting:
            assert not seq.block_table and seq.num_computed == 0 and seq.row == -1, "I9 waits"

    def check_hit(self, seq: Sequence, start: int) -> None:
        """That a sequence which begins at ``start`` could not begin later. For its launch."""
        runner, end = self.runner, start + self.runner.page_size
        if end > seq.num_prompt + len(seq.output_ids) - 2:
            return
        num_pages = start // runner.page_size
        before = tuple(runner.digests[page_id] for page_id in seq.block_table[:num_pages])
        origin, tokens = (salt_of(seq.namespace), before), seq.token_range(start, end)
        for page_id in self.scheduler.pool._page_ids.values():
            is_next = runner.origins[page_id] == origin and runner.contents[page_id] == tokens
            assert not is_next, f"sequence {seq.seq_id} computes what page {page_id} holds"

    def check_published(self, plan: Plan) -> None:
        """That the pages which a plan filled can be found. For its commit, if no row was NaN."""
        runner, prefixes = self.runner, self.scheduler.pool._prefixes
        page_size = runner.page_size
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.status is not SequenceStatus.RUNNING or (
                seq.num_preemptions != chunk.num_preemptions
            ):
                continue
            for page_id in seq.block_table[chunk.start // page_size : chunk.end // page_size]:
                is_found = prefixes[page_id] is not None or any(
                    runner.origins[other] == runner.origins[page_id]
                    and runner.contents[other] == runner.contents[page_id]
                    for other in self.scheduler.pool._page_ids.values()
                )
                assert is_found, f"page {page_id} of sequence {seq.seq_id} is full and unpublished"

    def check_idle(self) -> None:
        """Once nothing runs and nothing waits, every page can be had."""
        pool = self.scheduler.pool
        assert self.scheduler.num_sequences == 0, "I9 a sequence is left"
        assert pool.num_free == pool.num_pages and not any(pool._num_refs), "I1 a page leaked"
        assert not self.scheduler.running and not self.scheduler.waiting, "I9"
