"""The page pool: which pages of the KV cache are free, in use, or kept for what they hold.

    free    nobody refers to it, and what it holds means nothing
    used    one or more block tables refer to it; only the owner of a page that is not full writes
    idle    nobody refers to it, but it is published: a later prompt may begin with what it holds

A full page is published under a key that stands for every token up to its end and for whom they
may be shared with. Idle pages count as free: the least recently used is forgotten when a page is
needed. No tensors here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple


class Prefix(NamedTuple):
    """What a full page holds: its own tokens, and by the key all those before it too."""

    key: bytes
    tokens: bytes  # the page's token ids, 4 bytes each


def root_key(model: str, namespace: str) -> bytes:
    """The key before the first page: pages are found only by the same model and namespace."""
    text = f"{len(model)}:{model}{namespace}"
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def extend_key(parent: bytes, token_ids: Seq[int]) -> Prefix:
    """The page of ``token_ids`` that follows the page with the key ``parent``."""
    tokens = array("i", token_ids).tobytes()
    return Prefix(hashlib.sha256(parent + tokens).digest(), tokens)


class PagePool:
    """Hands out page ids ``1 … num_pages``. Page 0 is owned by nobody: padding points at it.

    Freed pages are reused last-in, first-out, so that a small working set stays warm in the
    processor's cache; idle pages only when no other is free.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._num_refs = [0] * (num_pages + 1)
        self._prefixes: list[Prefix | None] = [None] * (num_pages + 1)  # of published pages
        self._page_ids: dict[bytes, int] = {}  # key -> published page
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Published pages, used or idle."""
        return len(self._page_ids)

    def num_idle(self, page_ids: Iterable[int]) -> int:
        """How many of these published pages `share` would take from those that are free."""
        return sum(page_id in self._idle for page_id in page_ids)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages with one reference each, or None and no change if fewer are free."""
        if count > self.num_free:
            return None
        num_kept = max(len(self._free) - count, 0)
        page_ids = self._free[num_kept:][::-1]
        del self._free[num_kept:]
        while len(page_ids) < count:
            page_id, _ = self._idle.popitem(last=False)
            self._unpublish(page_id)
            page_ids.append(page_id)
        for page_id in page_ids:
            self._num_refs[page_id] = 1
        return page_ids

    def find(self, prefix: Prefix) -> int | None:
        """The published page that holds exactly this."""
        page_id = self._page_ids.get(prefix.key)
        return page_id if page_id is not None and self._prefixes[page_id] == prefix else None

    def share(self, page_ids: Iterable[int]) -> None:
        """Add a reference to each of these published pages."""
        for page_id in page_ids:
            assert self._prefixes[page_id] is not None, f"page {page_id} is not published"
            self._idle.pop(page_id, None)
            self._num_refs[page_id] += 1

    def publish(self, page_id: int, prefix: Prefix) -> None:
        """Let a full page be found. A page whose contents another one holds stays unpublished."""
        assert self._num_refs[page_id] > 0, f"page {page_id} is not in use"
        if prefix.key not in self._page_ids and self._prefixes[page_id] is None:
            self._page_ids[prefix.key] = page_id
            self._prefixes[page_id] = prefix

    def free(self, page_ids: Seq[int]) -> None:
        """Take back one reference to each page of a block table.

        The last pages of the table are the first to be forgotten: without those before them
        nothing finds them.
        """
        for page_id in reversed(page_ids):
            assert self._num_refs[page_id] > 0, f"page {page_id} freed twice"
            self._num_refs[page_id] -= 1
            if self._num_refs[page_id] == 0:
                if self._prefixes[page_id] is None:
                    self._free.append(page_id)
                else:
                    self._idle[page_id] = None

    def forget(self, page_ids: Iterable[int]) -> None:
        """Unpublish pages whose contents are not to be trusted; who uses them keeps them."""
        for page_id in page_ids:
            if self._prefixes[page_id] is not None:
                self._unpublish(page_id)
                if page_id in self._idle:
                    del self._idle[page_id]
                    self._free.append(page_id)

    def forget_prefixes(self, prefixes: Iterable[Prefix]) -> None:
        """Unpublish the pages with these contents, whoever uses them now."""
        self.forget([page_id for prefix in prefixes if (page_id := self.find(prefix)) is not None])

    def forget_all(self) -> None:
        """Unpublish every page."""
        self.forget(list(self._page_ids.values()))

    def check(self, block_tables: Iterable[Seq[int]]) -> None:
        """Assert that references, states and keys agree, and with the given tables. For tests."""
        num_refs = [0] * (self.num_pages + 1)
        for table in block_tables:
            for page_id in table:
                num_refs[page_id] += 1
        assert num_refs == self._num_refs, f"tables refer {num_refs}, counted {self._num_refs}"
        used = [page_id for page_id, count in enumerate(num_refs) if count]
        assert sorted([*self._free, *self._idle, *used]) == list(range(1, self.num_pages + 1))
        published = {page_id for page_id, prefix in enumerate(self._prefixes) if prefix}
        assert published == set(self._page_ids.values())
        assert len(published) == len(self._page_ids)
        assert published.isdisjoint(self._free) and published.issuperset(self._idle)
        for key, page_id in self._page_ids.items():
            prefix = self._prefixes[page_id]
            assert prefix is not None and prefix.key == key

    def _unpublish(self, page_id: int) -> None:
        prefix = self._prefixes[page_id]
        assert prefix is not None
        del self._page_ids[prefix.key]
        self._prefixes[page_id] = None
