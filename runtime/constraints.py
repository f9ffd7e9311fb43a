"""What the next token of a sequence may be: the form of its answer, the end of its thought.

A `Constraint` belongs to one sequence and follows from its output ids alone, so that a preemption
changes nothing. A thought passes unhindered until it is as long as its budget or goes round in
circles; then the tokens of ``</think>`` are the only ones allowed. A grammar begins behind it.
While a thought goes on that a grammar waits for, end tokens are banned, and once a grammar is
complete they are all that is allowed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from runtime.control_tokens import THINK_END
from runtime.grammar import Grammar
from runtime.request import SamplingParams
from runtime.tokenizer import Tokenizer

Bitmask = npt.NDArray[np.int32]
"""[ceil(vocab / 32)]: bit i % 32 of word i // 32 is set if token i is allowed."""

MAX_PERIOD = 64
MIN_REPEATS = 4
MIN_SPAN = 64


class ConstraintError(Exception):
    """The tokens of a sequence or its grammar leave nothing that may come next."""


class LoopDetector:
    """Finds tokens that repeat exactly, at a constant cost per token.

    A loop is a run of tokens of which each equals the one ``period`` before it. It counts once it
    is at least `MIN_SPAN` tokens long and holds its period at least `MIN_REPEATS` times: one token
    64 times, 16 tokens 4 times, 64 tokens 4 times.
    """

    def __init__(self) -> None:
        self._periods = np.arange(1, MAX_PERIOD + 1)
        self._last = np.full(MAX_PERIOD, -1, np.int64)  # the latest token comes first
        self._spans = self._periods.copy()  # length of the run per period
        self._limits = np.maximum(MIN_REPEATS * self._periods, MIN_SPAN)

    def feed(self, token_id: int) -> None:
        self._spans = np.where(self._last == token_id, self._spans + 1, self._periods)
        self._last[1:] = self._last[:-1]
        self._last[0] = token_id

    def may_loop_within(self, num_tokens: int) -> bool:
        """Whether so many more tokens could complete a loop; 0: whether there is one."""
        return bool((self._spans + num_tokens >= self._limits).any())


class _Phase(enum.Enum):
    START = enum.auto()  # the answer, unless its first token opens a thought
    THOUGHT = enum.auto()
    ANSWER = enum.auto()


class Constraints:
    """Makes the constraints of one engine's sequences; holds what they have in common."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.grammar_vocabulary
        self.num_tokens = tokenizer.num_tokens
        self.num_words = -(-self.num_tokens // 32)
        self.end_ids = frozenset(tokenizer.eos_token_ids)
        end_id = tokenizer.think_end_id
        self.closing_ids = self.vocabulary.spell(THINK_END.encode()) if end_id is None else [end_id]
        self.newline_ids = frozenset(
            i for i, text in enumerate(tokenizer.token_bytes) if text and not text.strip(b"\n")
        )
        self._latest: tuple[Grammar, LLMatcher] | None = None
        self.thought_bitmask = self.bitmask(range(self.num_tokens)) & ~self.bitmask(self.end_ids)
        if end_id is None:
            # What follows in the same token would be text that no grammar has seen.
            behind = (text.partition(b">")[2] for text in tokenizer.token_bytes)
            rests = [i for i, rest in enumerate(behind) if rest.strip(b"\n")]
            self.thought_bitmask &= ~self.bitmask(rests)

    def make(self, prompt_ids: Seq[int], params: SamplingParams) -> Constraint | None:
        """None for a sequence that nothing holds back. Raises `BadRequest` for a bad grammar."""
        return Constraint(self, prompt_ids, params) if params.is_constrained else None

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """One of its own for each choice; those of a request come in a row and share the work.

        Raises `BadRequest` for a grammar that cannot be followed.
        """
        if self._latest is None or self._latest[0] != grammar:
            self._latest = None  # its memory is free before another takes as much
            self._latest = grammar, self.vocabulary.compile(grammar)
        return self._latest[1].deep_copy()

    def bitmask(self, token_ids: Seq[int] | frozenset[int]) -> Bitmask:
        bits = np.zeros(32 * self.num_words, np.uint8)
        bits[list(token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def may_open(self, prompt_ids: Seq[int]) -> bool:
        """Whether an answer to a prompt without an open thought may begin with one."""
        for token_id in reversed(prompt_ids):
            if token_id == self.tokenizer.think_end_id:
                return False  # the prompt closed the thought already
            if self.tokenizer.token_bytes[token_id].strip():
                break
        return self.tokenizer.think_start_id is not None


class Constraint:
    """Of one sequence. Its methods take the output ids as far as they are known."""

    def __init__(self, shared: Constraints, prompt_ids: Seq[int], params: SamplingParams) -> None:
        """Raises `BadRequest` for a grammar that cannot be followed."""
        self._shared = shared
        self._budget = params.thinking_budget
        self._loops = LoopDetector() if params.break_loops else None
        self._matcher = None if params.grammar is None else shared.matcher(params.grammar)
        self._num_followed = 0
        self._num_thought = 0
        self._num_closing = 0  # tokens of </think> that were forced so far
        self._closes = False
        self._thought_tail = b""
        self._may_skip = False  # a newline right behind a thought belongs to nothing
        self._unmatched: list[int] = []  # of the answer, not shown to the matcher yet
        self._has_ended = False
        if shared.tokenizer.opens_thought(prompt_ids):
            self._phase = _Phase.THOUGHT
            self._check_thought()
        else:
            self._phase = _Phase.START if shared.may_open(prompt_ids) else _Phase.ANSWER

    def depends_on_pending(self, output_ids: Seq[int], num_pending: int) -> bool:
        """Whether what may come next is not known before ``num_pending`` more tokens are."""
        self._follow(output_ids)
        if num_pending == 0:
            return False
        if self._matcher is not None:
            return True
        if self._phase is _Phase.ANSWER:
            return False
        if self._phase is _Phase.START:  # the first of them may open a thought
            return self._budget is not None and num_pending > self._budget
        if self._closes:
            return True
        if self._budget is not None and self._num_thought + num_pending >= self._budget:
            return True
        return self._loops is not None and self._loops.may_loop_within(num_pending)

    def is_masked(self, output_ids: Seq[int]) -> bool:
        """Whether the next token has to be one of ``bitmask``; if not, any will do."""
        self._follow(output_ids)
        return self._matcher is not None or (self._phase is _Phase.THOUGHT and self._closes)

    def bitmask(self, output_ids: Seq[int], banned_ids: Seq[int] = ()) -> Bitmask:
        """The tokens that may come next: at least one.

        ``banned_ids`` are left out if others are left. Raises `ConstraintError`.
        """
        self._follow(output_ids)
        allowed = self._allowed()
        if banned_ids:
            others = allowed & ~self._shared.bitmask(frozenset(banned_ids))
            if others.any():
                return others
        if not allowed.any():
            raise ConstraintError("no token may come next")
        return allowed

    def _allowed(self) -> Bitmask:
        shared = self._shared
        if self._phase is _Phase.THOUGHT:
            if self._closes:
                return shared.bitmask(shared.closing_ids[self._num_closing :][:1])
            return shared.thought_bitmask
        if self._has_ended:
            return shared.bitmask(shared.end_ids)
        allowed = self._grammar_bitmask()
        if self._may_skip:
            allowed = allowed | shared.bitmask(shared.newline_ids)
        think_start_id = shared.tokenizer.think_start_id
        if self._phase is _Phase.START and think_start_id is not None:
            allowed = allowed | shared.bitmask([think_start_id])
        return allowed

    def _grammar_bitmask(self) -> Bitmask:
        """Raises `ConstraintError` if the grammar and its tokens do not fit, or take too much."""
        matcher = self._matcher
        assert matcher is not None, "only a grammar masks an answer"
        try:
            if self._unmatched:
                matcher.consume_tokens(self._unmatched)
                self._unmatched = []
            allowed = np.frombuffer(matcher.compute_bitmask(), np.int32)
            allowed = allowed[: self._shared.num_words]  # it may have a word to spare
            error = matcher.get_error()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:  # a panic of the library is no Exception
            raise ConstraintError(f"the grammar's matcher failed: {failure}") from None
        if error:
            raise ConstraintError(error)
        return allowed

    # -- from tokens to the place in the answer ----------------------------------------------

    def _follow(self, output_ids: Seq[int]) -> None:
        for index in range(self._num_followed, len(output_ids)):
            self._take(output_ids[index])
        self._num_followed = len(output_ids)

    def _take(self, token_id: int) -> None:
        shared = self._shared
        if self._phase is _Phase.START:
            if token_id == shared.tokenizer.think_start_id:
                self._phase = _Phase.THOUGHT
                self._check_thought()
                return
            is_blank = not shared.tokenizer.token_bytes[token_id].strip()
            if self._matcher is not None or not is_blank:
                self._phase = _Phase.ANSWER
        if self._phase is _Phase.THOUGHT:
            self._take_thought(token_id)
        elif self._matcher is not None and not self._has_ended:
            if self._may_skip and token_id in shared.newline_ids:
                pass
            elif token_id in shared.end_ids:
                self._has_ended = True
            else:
                self._unmatched.append(token_id)
            self._may_skip = False

    def _take_thought(self, token_id: int) -> None:
        if self._ends_thought(token_id):
            self._phase = _Phase.ANSWER
            self._may_skip = True
            return
        if self._closes:
            self._num_closing += 1
            return
        self._num_thought += 1
        if self._loops is not None:
            self._loops.feed(token_id)
        self._check_thought()

    def _ends_thought(self, token_id: int) -> bool:
        end_id = self._shared.tokenizer.think_end_id
        if end_id is not None:
            return token_id == end_id
        text = self._thought_tail + self._shared.tokenizer.token_bytes[token_id]
        self._thought_tail = text[1 - len(THINK_END) :]
        return THINK_END.encode() in text

    def _check_thought(self) -> None:
        is_long = self._budget is not None and self._num_thought >= self._budget
        self._closes = is_long or (self._loops is not None and self._loops.may_loop_within(0))
