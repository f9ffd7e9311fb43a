"""Which prompts may have ended the engine process: strikes, suspects, and the convicted."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

MAX_PROMPTS = 1024
MAX_STRIKES = 2


def prompt_digest(prompt_ids: Seq[int]) -> bytes:
    """SHA-256 of a prompt's token ids."""
    return hashlib.sha256(array("q", prompt_ids).tobytes()).digest()


class Quarantine:
    """Prompts by their digest. Pure bookkeeping; bounded, the oldest strike is forgotten first.

    A prompt that ran while the engine died has a strike and is a suspect; with two it is
    quarantined. One that then runs to a good end is cleared.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_prompts = max_prompts
        self._strikes: dict[bytes, int] = {}  # the latest strike is last

    def __len__(self) -> int:
        return len(self._strikes)

    def is_suspect(self, digest: bytes) -> bool:
        return digest in self._strikes

    def is_quarantined(self, digest: bytes) -> bool:
        return self._strikes.get(digest, 0) >= MAX_STRIKES

    def strike(self, digests: Iterable[bytes]) -> None:
        """One death, and the prompts that ran then; each gets one strike however often it ran."""
        for digest in dict.fromkeys(digests):
            self._strikes[digest] = self._strikes.pop(digest, 0) + 1
        while len(self._strikes) > self._max_prompts:
            del self._strikes[next(iter(self._strikes))]

    def acquit(self, digest: bytes) -> None:
        """Clear a prompt that ran to a good end. Harmless for one without a strike."""
        self._strikes.pop(digest, None)
