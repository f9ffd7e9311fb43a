"""Where every sequence of the server is, from its submission to its end. Pure bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import wire
from runtime.errors import EngineDead, Quarantined
from runtime.generation import Generation
from runtime.quarantine import Quarantine, prompt_digest
from runtime.request import FinishReason


@dataclass(eq=False, slots=True)
class Submission:
    """A generation that has not ended, with what it takes to send it to another engine."""

    generation: Generation
    message: wire.Message | None  # None once it started: it is not sent again
    queued_at: float  # seconds on the client's clock
    digest: bytes = b""  # of its prompt, once somebody needs it

    @property
    def seq_id(self) -> int:
        return self.generation.seq_id

    def identify(self) -> bytes:
        """The digest of its prompt."""
        if not self.digest:
            assert self.message is not None
            self.digest = prompt_digest(self.message["prompt_ids"])
        return self.digest


class Submissions:
    """Each submission is in one place, in order of arrival: unsent → sent → running → gone.

    One that is aborted after it was sent is *leaving* until the engine has let go of it: so long it
    may be what hangs or kills the engine. A suspect (`Quarantine`) is sent only while the engine
    has no other.
    """

    def __init__(self) -> None:
        self._unsent: dict[int, Submission] = {}
        self._sent: dict[int, Submission] = {}
        self._running: dict[int, Submission] = {}
        self._leaving: dict[int, Submission] = {}
        self._suspect: int | None = None  # the one under suspicion that the engine has
        self._quarantine = Quarantine()

    @property
    def num_waiting(self) -> int:
        return len(self._unsent) + len(self._sent)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def engine_has_work(self) -> bool:
        return bool(self._sent or self._running or self._leaving)

    def add(self, submission: Submission) -> None:
        """Raises `Quarantined`."""
        if self._is_quarantined(submission):
            raise quarantined()
        self._unsent[submission.seq_id] = submission

    def send_next(self) -> wire.Message | None:
        """The message that the engine gets next, now counted as sent; None if all have to wait."""
        for seq_id, submission in self._unsent.items():
            if self._quarantine and self._quarantine.is_suspect(submission.identify()):
                if self._suspect is not None:
                    continue
                self._suspect = seq_id
            self._sent[seq_id] = self._unsent.pop(seq_id)
            return submission.message
        return None

    def start(self, seq_id: int, num_cached: int) -> None:
        """The engine runs it for the first time. Harmless if that was known."""
        submission = self._sent.pop(seq_id, None)
        if submission is not None:
            self._running[seq_id] = submission
        else:
            submission = self._leaving.get(seq_id)
        if submission is not None and submission.message is not None:
            submission.identify()
            submission.message = None
            submission.generation.num_cached_tokens = num_cached

    def in_engine(self, seq_id: int) -> Submission | None:
        return self._running.get(seq_id) or self._sent.get(seq_id)

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """The engine ended it; a good end clears its prompt of suspicion."""
        submission = self._running.pop(seq_id, None) or self._sent.pop(seq_id, None)
        assert submission is not None
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._quarantine.acquit(submission.digest)
        self._release(seq_id)

    def remove(self, seq_id: int) -> tuple[Submission | None, bool]:
        """Take it back: (None if it has ended, whether the engine has to be told)."""
        submission = self._unsent.pop(seq_id, None)
        if submission is not None:
            return submission, False
        submission = self._running.pop(seq_id, None) or self._sent.pop(seq_id, None)
        if submission is not None:
            self._leaving[seq_id] = submission
        return submission, submission is not None

    def left(self, seq_id: int) -> None:
        """The engine has let go of one that was aborted."""
        self._leaving.pop(seq_id, None)
        self._release(seq_id)

    def all_ids(self) -> list[int]:
        return [*self._running, *self._sent, *self._unsent]

    def waiting_since(self, clock: float) -> list[Submission]:
        """Those that were queued by then and have not started."""
        waiting = [*self._sent.values(), *self._unsent.values()]
        return [submission for submission in waiting if submission.queued_at <= clock]

    def bury(self) -> int:
        """The engine died: fail what it ran, keep what waited; how many generations ended."""
        blamed = [*self._running.values(), *self._leaving.values()]
        self._quarantine.strike(one.digest for one in blamed if one.message is None)
        lost = list(self._running.values())
        waiting = sorted([*self._sent.items(), *self._unsent.items()])
        self._running, self._leaving, self._sent = {}, {}, {}
        self._unsent = {seq_id: one for seq_id, one in waiting if not self._is_quarantined(one)}
        self._suspect = None
        for submission in lost:
            submission.generation.fail(
                quarantined()
                if self._is_quarantined(submission)
                else EngineDead("The engine failed while it worked on this request.")
            )
        convicted = [one for seq_id, one in waiting if seq_id not in self._unsent]
        for submission in convicted:
            submission.generation.fail(quarantined())
        return len(lost) + len(convicted)

    def _is_quarantined(self, submission: Submission) -> bool:
        # hashing a long prompt takes a millisecond, and nearly always nothing is under suspicion
        return bool(self._quarantine) and self._quarantine.is_quarantined(submission.identify())

    def _release(self, seq_id: int) -> None:
        if seq_id == self._suspect:
            self._suspect = None


def quarantined() -> Quarantined:
    return Quarantined(
        "This prompt was being answered both times when the engine failed, so it is not accepted "
        "any more. Do not send it again."
    )
