"""A model whose next token is a hash of everything it reads through the page tables.

Slots of the KV cache hold hashes. The first slot of a page hashes all pages before it, the others
the slot before; a token is a hash of all pages of its sequence. A wrong, stale, foreign, shifted or
missing page anywhere therefore changes every later token. A poisoned page stands for one with NaN:
whoever reads it draws token -1 and writes NaN on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from runtime.request import Sequence as EngineSequence
from runtime.request import SequenceStatus
from runtime.scheduler import Chunk, Plan, SampledToken

EOS = 0
NOT_FINITE = -1


class CanaryError(Exception):
    """The device was asked for something that no correct plan asks for."""


class StepFault(RuntimeError):
    """A whole step that fails on purpose, as a device does that reports an error."""


@dataclass(slots=True)
class StepFaults:
    """What goes wrong in one step."""

    not_finite: Container[int] = ()  # ids of sequences whose rows are NaN from now on
    failed: Container[int] = ()  # ids of sequences whose parameters cannot be prepared
    dies_after: int | None = None  # chunks that run before the device stops
    at_read: Exception | None = None  # raised when the tokens are read


NO_FAULTS = StepFaults()


class CanaryStep:
    def __init__(self, runner: CanaryRunner, plan: Plan, failed: list[EngineSequence]) -> None:
        self.plan = plan
        self.failed = failed
        self.drawn: list[SampledToken] = []
        self.error: Exception | None = None
        self._runner = runner

    def tokens(self) -> list[SampledToken]:
        self._runner.take_oldest(self)
        if self.error is not None:
            raise self.error
        return self.drawn


Origin = tuple[int, tuple[int, ...]]
"""What a page hangs on: the salt of its namespace and the digests of the pages before it."""


class CanaryRunner:
    """Executes plans in the order of launch on pages of hashes. A `Runner` of the engine.

    As on a GPU the tables are the device's own: entries are appended as the host's table grows,
    and start anew when a plan says that a sequence started. Raises `CanaryError` for a plan that
    writes a page which others hold or which is published, or leaves a gap in a sequence.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_step_tokens: int,
        vocab_size: int,
        faults: Callable[[Plan], StepFaults] = lambda plan: NO_FAULTS,
    ) -> None:
        """``faults`` is asked before each step; what it raises, ``launch`` raises."""
        self.page_size = page_size
        self.max_step_tokens = max_step_tokens
        self.vocab_size = vocab_size
        self.faults = faults
        self.num_launched = 0
        self.last_read: Plan | None = None
        self.running: Callable[[], Iterable[EngineSequence]] = tuple
        self.is_published: Callable[[int], bool] = lambda page_id: False
        self.slots = [[-7 - page_id] * page_size for page_id in range(num_pages + 1)]
        self.digests = [hash(tuple(slots)) for slots in self.slots]  # of the slots written last
        self.poisoned: set[int] = set()
        self.contents: list[list[int]] = [[] for _ in range(num_pages + 1)]  # tokens as written
        self.origins: list[Origin | None] = [None] * (num_pages + 1)
        self.row_owners: list[int] = [-1] * max_num_seqs  # ids of sequences
        self.poison_of: dict[int, set[tuple[int, int]]] = {}  # pages with NaN that a sequence met
        self._writers: list[int] = [-1] * (num_pages + 1)  # lives
        self._lives = [-1] * max_num_seqs  # a number per start of a row
        self._num_lives = 0
        self.tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._ends = [0] * max_num_seqs  # tokens of each row that the device has
        self._salts = [0] * max_num_seqs
        self._last_tokens = [0] * max_num_seqs
        self._in_flight: deque[CanaryStep] = deque()

    def record_all(self) -> None:
        """Nothing is recorded here."""

    def launch(self, plan: Plan) -> CanaryStep:
        faults = self.faults(plan)
        if plan.num_tokens > self.max_step_tokens:
            raise CanaryError(f"{plan.num_tokens} tokens in a step of {self.max_step_tokens}")
        for seq in plan.started:
            row = seq.row
            self._num_lives += 1
            self._lives[row] = self._num_lives
            self.row_owners[row] = seq.seq_id
            self.tables[row] = []
            self._ends[row] = plan_start(plan, seq)
            self._salts[row] = salt_of(seq.namespace)
        step = CanaryStep(self, plan, [seq for seq in plan.started if seq.seq_id in faults.failed])
        step.error = faults.at_read
        for index, chunk in enumerate(plan.chunks):
            if index == faults.dies_after:
                raise StepFault("the device stopped in the middle of a step")
            if (chunk.num_tokens == 1) != (index < plan.num_decodes):
                raise CanaryError("chunks of a single token come first, and are counted")
            token_id = self._run(chunk, chunk.seq.seq_id in faults.not_finite)
            if chunk.samples:
                step.drawn.append(SampledToken(token_id))
        self._in_flight.append(step)
        self.num_launched += 1
        return step

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def remaining_poison(self, seq_id: int) -> list[int]:
        """Published pages with the NaN that a sequence met. Right after its end: none."""
        return [
            page_id
            for page_id, writer in self.poison_of.get(seq_id, ())
            if page_id in self.poisoned
            and self._writers[page_id] == writer
            and self.is_published(page_id)
        ]

    def overwrite(self, page_id: int, offset: int) -> None:
        """Damage one slot, as a stray write would."""
        self.slots[page_id][offset] ^= 1
        self.digests[page_id] = hash(tuple(self.slots[page_id]))

    def take_oldest(self, step: CanaryStep) -> None:
        """Steps are read in the order of launch, once."""
        if not self._in_flight or self._in_flight.popleft() is not step:
            raise CanaryError("a step was read out of order, twice, or after a fault")
        self.last_read = step.plan

    def give_up(self) -> None:
        """After a fault nobody may read what was under way."""
        self._in_flight.clear()

    def _run(self, chunk: Chunk, not_finite: bool) -> int:
        """Write [start, end), then draw from what the table shows of [0, end)."""
        seq, start, end = chunk.seq, chunk.start, chunk.end
        row, page_size = seq.row, self.page_size
        if seq.status is not SequenceStatus.RUNNING or start != self._ends[row] or start >= end:
            raise CanaryError(
                f"chunk [{start}, {end}) of sequence {seq.seq_id}, which is {seq.status.name}: "
                f"the device has {self._ends[row]} tokens of its row"
            )
        table = self.tables[row]
        table += seq.block_table[len(table) :]
        num_pages = -(-end // page_size)
        if num_pages > len(table):
            raise CanaryError(f"sequence {seq.seq_id} has no page for position {end - 1}")
        # A chunk is known, or is one token that the device drew and the host has not read.
        token_ids = seq.token_range(start, end) or [self._last_tokens[row]]
        if len(token_ids) != end - start:
            raise CanaryError(f"only {len(token_ids)} tokens of [{start}, {end}) are known")
        first = start // page_size
        is_poisoned = not_finite
        if self.poisoned and not self.poisoned.isdisjoint(table[: -(-start // page_size)]):
            is_poisoned = True
        position = start
        for index in range(first, num_pages):
            offset = position % page_size
            stop = min(end - index * page_size, page_size)
            part = token_ids[position - start : index * page_size + stop - start]
            self._write(seq, index, offset, part, is_poisoned)
            position = index * page_size + stop
        self._ends[row] = end
        if is_poisoned:
            met = {(page_id, self._writers[page_id]) for page_id in table[:num_pages]}
            met = {page for page in met if page[0] in self.poisoned}
            self.poison_of.setdefault(seq.seq_id, set()).update(met)
        if not chunk.samples:
            return 0
        token_id = NOT_FINITE
        if not is_poisoned:
            read = tuple(map(self.digests.__getitem__, table[:num_pages]))
            token_id = hash(read) % self.vocab_size
        self._last_tokens[row] = token_id
        return token_id

    def _write(
        self, seq: EngineSequence, index: int, offset: int, token_ids: list[int], poison: bool
    ) -> None:
        row = seq.row
        table = self.tables[row]
        page_id, life = table[index], self._lives[row]
        if offset == 0:
            self._take_over(seq, page_id, index)
            before = tuple(map(self.digests.__getitem__, table[:index]))
            previous = hash((self._salts[row], before))
            self._writers[page_id] = life
            self.origins[page_id] = (self._salts[row], before)
            self.contents[page_id] = []
            if poison:
                self.poisoned.add(page_id)
            else:
                self.poisoned.discard(page_id)
        else:
            if self._writers[page_id] != life:
                raise CanaryError(
                    f"sequence {seq.seq_id} writes on in page {page_id}, which it did not begin"
                )
            previous = self.slots[page_id][offset - 1]
            if poison:
                self.poisoned.add(page_id)
        slots = self.slots[page_id]
        for token_id in token_ids:
            previous = hash((previous, token_id))
            slots[offset] = previous
            offset += 1
        self.contents[page_id] += token_ids
        self.digests[page_id] = hash(tuple(slots[:offset]))

    def _take_over(self, seq: EngineSequence, page_id: int, index: int) -> None:
        if page_id == 0 or self.is_published(page_id):
            raise CanaryError(f"sequence {seq.seq_id} writes page {page_id}, which is published")
        if seq.block_table.count(page_id) != 1 or seq.block_table[index] != page_id:
            raise CanaryError(f"page {page_id} is not page {index} of sequence {seq.seq_id} alone")
        for other in self.running():
            if other is not seq and page_id in other.block_table:
                raise CanaryError(
                    f"sequence {seq.seq_id} writes page {page_id} of sequence {other.seq_id}"
                )


def plan_start(plan: Plan, seq: EngineSequence) -> int:
    """Where a sequence that just started begins: at the end of what the cache has of it."""
    for chunk in plan.chunks:
        if chunk.seq is seq:
            return chunk.start
    raise CanaryError(f"sequence {seq.seq_id} started without a chunk")


def salt_of(namespace: str) -> int:
    """The same in every process, unlike ``hash(namespace)``."""
    return int.from_bytes(namespace.encode(), "big") + 1


def solo(
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    namespace: str,
    page_size: int,
    vocab_size: int,
    ends: Container[int] = (EOS,),
) -> list[int]:
    """What the canary answers to a prompt, from the prompt alone: the oracle."""
    salt = salt_of(namespace)
    digests: list[int] = []  # of full pages
    slots: list[int] = []  # of the last page
    previous = 0

    def read(token_id: int) -> None:
        nonlocal previous
        if len(slots) == page_size:
            digests.append(hash(tuple(slots)))
            slots.clear()
        if not slots:
            previous = hash((salt, tuple(digests)))
        previous = hash((previous, token_id))
        slots.append(previous)

    for token_id in prompt_ids:
        read(token_id)
    answer: list[int] = []
    while True:
        answer.append(hash((*digests, hash(tuple(slots)))) % vocab_size)
        if answer[-1] in ends or len(answer) == max_new_tokens:
            return answer
        read(answer[-1])
