"""Where every sequence of the server is, from its submission to its end. Pure bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import wire
from runtime.errors import EngineDead, Quarantined, QueueFull
from runtime.generation import Generation
from runtime.quarantine import Quarantine, prompt_digest
from runtime.request import FinishReason

PROBATION_TOKENS = 4
"""What kills an engine does so while it is read or soon after; a suspect is watched so long."""


@dataclass(eq=False, slots=True)
class Submission:
    """A generation that has not ended, with what it takes to send it to another engine."""

    generation: Generation
    message: wire.Message | None  # None once it started: it is not sent again
    queued_at: float  # seconds on the client's clock
    num_tokens: int = 0  # of its answer, so far
    digest: bytes = b""  # of its prompt, once somebody needs it

    @property
    def seq_id(self) -> int:
        return self.generation.seq_id

    @property
    def has_started(self) -> bool:
        return self.message is None

    def identify(self) -> bytes:
        """The digest of its prompt."""
        if not self.digest:
            assert self.message is not None
            self.digest = prompt_digest(self.message["prompt_ids"])
        return self.digest


class Submissions:
    """Each submission is in one place, in order of arrival: unsent → sent → running → gone.

    One that is aborted after it was sent is *leaving* until the engine has let go of it: so long it
    may be what hangs or kills the engine.

    After a death those who ran are suspects (`Quarantine`). Suspects are sent one at a time: each
    is *watched* until it has drawn `PROBATION_TOKENS`; one that was there at several deaths is
    watched to its end and has no other suspect beside it. A suspect that is alone when the engine
    dies again is convicted; if there were several, all of them get another strike.
    """

    def __init__(self) -> None:
        self._unsent: dict[int, Submission] = {}
        self._sent: dict[int, Submission] = {}
        self._running: dict[int, Submission] = {}
        self._leaving: dict[int, Submission] = {}
        self._watched: Submission | None = None
        self._quarantine = Quarantine()
        self.now = 0.0  # seconds, kept by the client

    @property
    def num_waiting(self) -> int:
        return len(self._unsent) + len(self._sent)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def engine_has_work(self) -> bool:
        return bool(self._sent or self._running or self._leaving)

    def check_room(self, count: int, *, max_running: int, max_waiting: int) -> None:
        """Raises `QueueFull` if ``count`` more would be too many.

        Rows of the engine that are free are room too.
        """
        num_running, num_waiting = self.num_running, self.num_waiting
        limit = max_waiting + max(max_running - num_running, 0)
        if num_waiting + count > limit:
            raise QueueFull(
                f"{num_running} sequences are running and {num_waiting} are waiting; {count} more "
                f"would make {num_waiting + count}, and the limit is {limit} now. Try again later."
            )

    def add(self, submission: Submission) -> None:
        """Raises `Quarantined`."""
        if self._is_quarantined(submission):
            raise quarantined()
        self._unsent[submission.seq_id] = submission

    def send_next(self) -> wire.Message | None:
        """The message that the engine gets next, now counted as sent; None if all have to wait."""
        may_send_suspects = self._watched is None
        for seq_id, submission in self._unsent.items():
            if self._quarantine and self._quarantine.is_suspect(submission.identify(), self.now):
                if self._is_grave(submission) and self._suspects_inside():
                    may_send_suspects = False  # it waits for them, and they may not overtake it
                if not may_send_suspects:
                    continue
                self._watched = submission
            self._sent[seq_id] = self._unsent.pop(seq_id)
            return submission.message
        return None

    def start(self, seq_id: int, num_cached: int, at: float | None = None) -> None:
        """The engine runs it for the first time, since ``at``. Harmless if that was known."""
        submission = self._sent.pop(seq_id, None)
        if submission is not None:
            self._running[seq_id] = submission
        else:
            submission = self._leaving.get(seq_id)
        if submission is not None and not submission.has_started:
            submission.identify()
            submission.message = None
            submission.generation.num_cached_tokens = num_cached
            submission.generation.started_at = at

    def draw(self, seq_id: int) -> None:
        """The engine drew a token of its answer."""
        if seq_id not in self._running:
            self.start(seq_id, 0)
        submission = self._running.get(seq_id)
        if submission is not None:
            submission.num_tokens += 1
            is_through = submission.num_tokens >= PROBATION_TOKENS
            if submission is self._watched and is_through and not self._is_grave(submission):
                self._watched = None

    def in_engine(self, seq_id: int) -> Submission | None:
        return self._running.get(seq_id) or self._sent.get(seq_id)

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """The engine ended it; a good end clears its prompt of suspicion."""
        submission = self._running.pop(seq_id, None) or self._sent.pop(seq_id, None)
        assert submission is not None
        self._release(submission, is_good=reason in (FinishReason.STOP, FinishReason.LENGTH))

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
        """The engine has let go of one that was aborted, as are those that end on a stop string."""
        submission = self._leaving.pop(seq_id, None)
        if submission is not None:
            self._release(submission, is_good=submission.num_tokens >= PROBATION_TOKENS)

    def all_ids(self) -> list[int]:
        return [*self._running, *self._sent, *self._unsent]

    def waiting_since(self, clock: float) -> list[Submission]:
        """Those that were queued by then and have not started."""
        waiting = [*self._sent.values(), *self._unsent.values()]
        return [submission for submission in waiting if submission.queued_at <= clock]

    def bury(self) -> int:
        """The engine died: fail what it ran, keep what waited; how many generations ended."""
        inside = [*self._running.values(), *self._leaving.values()]
        blamed = {submission.digest for submission in inside if submission.has_started}
        suspects = {digest for digest in blamed if self._quarantine.is_suspect(digest, self.now)}
        if len(suspects) == 1:
            self._quarantine.convict(suspects.pop(), self.now)
        else:
            self._quarantine.strike(blamed, self.now)
        lost = list(self._running.values())
        waiting = sorted([*self._sent.items(), *self._unsent.items()])
        self._running, self._leaving, self._sent = {}, {}, {}
        self._unsent = {seq_id: one for seq_id, one in waiting if not self._is_quarantined(one)}
        self._watched = None
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

    def _suspects_inside(self) -> bool:
        inside = [*self._sent.values(), *self._running.values(), *self._leaving.values()]
        return any(self._quarantine.is_suspect(one.identify(), self.now) for one in inside)

    def _is_grave(self, submission: Submission) -> bool:
        return self._quarantine.is_grave(submission.identify(), self.now)

    def _is_quarantined(self, submission: Submission) -> bool:
        # hashing a long prompt takes a millisecond, and nearly always nothing is under suspicion
        quarantine = self._quarantine
        return bool(quarantine) and quarantine.is_quarantined(submission.identify(), self.now)

    def _release(self, submission: Submission, *, is_good: bool) -> None:
        if is_good:
            self._quarantine.acquit(submission.digest)
        if submission is self._watched:
            self._watched = None


def quarantined() -> Quarantined:
    return Quarantined(
        "This prompt was being answered when the engine failed, more than once, so it is not "
        "accepted any more. Do not send it again."
    )
