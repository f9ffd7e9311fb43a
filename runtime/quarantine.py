"""Which prompts may have ended the engine process: strikes, suspects, and the convicted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

MAX_PROMPTS = 1024
GRAVE_STRIKES = 2
STRIKE_SECONDS = 3600.0
"""So long a death is remembered against those who were there."""
CONVICTION_SECONDS = 86_400.0


def prompt_digest(prompt_ids: Seq[int]) -> bytes:
    """SHA-256 of a prompt's token ids."""
    return hashlib.sha256(array("q", prompt_ids).tobytes()).digest()


class Quarantine:
    """Prompts by their digest. Pure bookkeeping; bounded, the oldest entry is forgotten first.

    A prompt that ran while the engine died has a strike and is a suspect. One that then runs to a
    good end is cleared. ``now`` is in seconds of a clock that never goes back.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._strikes: dict[bytes, tuple[int, float]] = {}  # how many, and when the last; in order
        self._convicts: dict[bytes, float] = {}  # since when; in order

    def __bool__(self) -> bool:
        """Whether anything is held against any prompt."""
        return bool(self._strikes or self._convicts)

    def is_suspect(self, digest: bytes, now: float) -> bool:
        return self._num_strikes(digest, now) > 0

    def is_grave(self, digest: bytes, now: float) -> bool:
        """Whether it was there at several deaths."""
        return self._num_strikes(digest, now) >= GRAVE_STRIKES

    def is_quarantined(self, digest: bytes, now: float) -> bool:
        since = self._convicts.get(digest)
        return since is not None and now - since < CONVICTION_SECONDS

    def strike(self, digests: Iterable[bytes], now: float) -> None:
        """One death, and the prompts that ran then; each gets one strike however often it ran."""
        for digest in dict.fromkeys(digests):
            count = self._num_strikes(digest, now) + 1
            self._strikes.pop(digest, None)
            self._strikes[digest] = (count, now)
        while len(self._strikes) > self._max_prompts:
            del self._strikes[next(iter(self._strikes))]

    def convict(self, digest: bytes, now: float) -> None:
        """A suspect was watched, and the engine died again."""
        self._strikes.pop(digest, None)
        self._convicts.pop(digest, None)
        self._convicts[digest] = now
        if len(self._convicts) > self._max_prompts:
            del self._convicts[next(iter(self._convicts))]

    def acquit(self, digest: bytes) -> None:
        """Clear a prompt that ran to a good end. Harmless for one without a strike."""
        self._strikes.pop(digest, None)

    def _num_strikes(self, digest: bytes, now: float) -> int:
        count, last = self._strikes.get(digest, (0, now))
        return count if now - last < STRIKE_SECONDS else 0
