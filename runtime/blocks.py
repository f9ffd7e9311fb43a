"""The page pool: which pages of the KV cache are free and which are in use. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out page ids ``1 … num_pages``. Page 0 is owned by nobody: padding points at it.

    A page is either free or owned by exactly one block table. Freed pages are reused last-in,
    first-out, so that a small working set stays warm in the processor's cache.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._in_use = bytearray(num_pages + 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or None and no change if fewer are free."""
        if count > len(self._free):
            return None
        split = len(self._free) - count
        page_ids = self._free[split:][::-1]
        del self._free[split:]
        for page_id in page_ids:
            self._in_use[page_id] = 1
        return page_ids

    def free(self, page_ids: Iterable[int]) -> None:
        """Give pages back; a page that is not in use is our own bug."""
        for page_id in page_ids:
            assert self._in_use[page_id], f"page {page_id} freed twice"
            self._in_use[page_id] = 0
            self._free.append(page_id)

    def check(self, block_tables: Iterable[list[int]]) -> None:
        """Assert that the given tables own every used page exactly once and nothing else."""
        owned = sorted(page_id for table in block_tables for page_id in table)
        used = [page_id for page_id in range(1, self.num_pages + 1) if self._in_use[page_id]]
        assert owned == used, f"pages owned {owned} but used {used}"
        assert sorted(self._free + used) == list(range(1, self.num_pages + 1))
