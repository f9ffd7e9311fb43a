"""Whether a request gives the same tokens, and the same log-probabilities, in any company.

    python -m tests.runtime.same_tokens --trials 500 --dtype bfloat16

A trial draws a request and answers it alone, by an engine that has run nothing else for it. Then a
new engine of another setting answers it among neighbours that join and leave, behind pages that
earlier requests left in the prefix cache, in small steps, from a pool that is too small, ahead of
what is read, by replayed steps, or again after a restart: a random selection of these. Tokens,
finish reason and log-probabilities must be equal. A trial counts for a kind only if the thing did
happen: pages were found, the sequence was preempted. Each trial follows from one number; for those
that differ the command that repeats them is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime import Engine, SamplingParams, TokenEvent
from runtime.request import Sequence
from tests.runtime.checkpoints import DEEPSEEK_V3, write_checkpoint
from tests.runtime.engines import TINY, chats, make_engine

KINDS = (
    "in a batch",
    "chunked",
    "cached: the same prompt",
    "cached: a prefix of it",
    "cached: the chat's last turn",
    "cached: while the other runs",
    "preempted",
    "run ahead",
    "replayed steps",
    "restarted",
)
CACHED = ("nothing", *(kind for kind in KINDS if kind.startswith("cached")))
PAGE_SIZES = (1, 8, 16, 32)
STEP_TOKENS = (7, 16, 33, 64, 512)
# oneDNN sums up to 512 numbers in one order for any number of rows: the embedded model has no more
WIDE = DEEPSEEK_V3 | {
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
NAMESPACE = "one key"
MAX_PROMPT, MAX_NEW = 300, 60
MAX_NEIGHBOURS = 31  # at a time
MAX_STEPS = 3000  # of one trial; then something hangs


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    params: SamplingParams

    @property
    def num_tokens(self) -> int:
        assert self.params.max_tokens is not None
        return len(self.prompt_ids) + self.params.max_tokens


@dataclass(frozen=True)
class Selection:
    """What happens in a trial, besides the options of its engine."""

    options: dict[str, Any]
    replays: bool
    num_neighbours: int  # at a time, at most
    is_short_of_pages: bool
    earlier: list[tuple[str, Request]]  # kind and request, run to their ends before
    twin: bool  # a neighbour with the same prompt
    restarts: bool


@dataclass
class Answer:
    events: list[TokenEvent] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    def add(self, event: TokenEvent) -> None:
        self.events.append(replace(event, seq_id=0))  # which is not the request's doing

    @property
    def is_complete(self) -> bool:
        return bool(self.events) and self.events[-1].finish_reason is not None

    @property
    def token_ids(self) -> list[int]:
        return [event.token_id for event in self.events if event.token_id is not None]


@dataclass(frozen=True)
class Outcome:
    alone: Answer
    selected: Answer

    @property
    def is_same(self) -> bool:
        return self.alone.events == self.selected.events


class Trials:
    """Random trials with one checkpoint in one dtype; each follows from its number."""

    def __init__(
        self,
        dtype: str,
        *,
        folder: Path = TINY,
        max_new: int = MAX_NEW,
    ) -> None:
        """``max_new`` tokens at most for a request. Batch-invariant if ``dtype`` needs it."""
        self.max_new = max_new
        self._make = lambda **options: make_engine(
            folder, dtype=dtype, batch_invariant=dtype != "float32", **options
        )
        self.lonely = self._make(prefix_cache=False)
        tokenizer = self.lonely.tokenizer
        assert tokenizer is not None
        self.chats = [tokenizer.encode_chat(chat).token_ids for chat in chats()]
        info = self.lonely.info
        self.vocab_size = info.vocab_size
        self.bytes_per_token = info.kv_cache_bytes // ((info.num_pages + 1) * info.page_size)

    def run(self, number: int) -> Outcome:
        rng = random.Random(number)
        request = self._request(rng)
        request, selection = self._select(rng, request, CACHED[number % len(CACHED)])
        alone = Answer()
        seq_id = self.lonely.add(request.prompt_ids, request.params)
        while not alone.is_complete:
            for event in self.lonely.step():
                assert event.seq_id == seq_id
                alone.add(event)
        return Outcome(alone, self._run_selected(rng, request, selection))

    # -- what is drawn ---------------------------------------------------------------------

    def _request(self, rng: random.Random) -> Request:
        prompt_ids = rng.choice(self.chats)
        if rng.random() < 0.5:
            length = rng.choice((rng.randint(1, 40), rng.randint(1, MAX_PROMPT)))
            prompt_ids = [rng.randrange(self.vocab_size) for _ in range(length)]
        return Request(prompt_ids[:MAX_PROMPT], self._params(rng))

    def _neighbour(self, rng: random.Random, grows: bool) -> Request:
        """Mostly short, so that many come and go; or small at first, and then in need of pages."""
        one = self._request(rng)
        if grows:
            params = replace(one.params, max_tokens=self.max_new, ignore_eos=True)
            return Request(one.prompt_ids[:4], params)
        length = rng.choice((8, 30, 30, MAX_PROMPT))
        max_tokens = rng.randint(1, rng.choice((10, self.max_new)))
        return Request(one.prompt_ids[:length], replace(one.params, max_tokens=max_tokens))

    def _params(self, rng: random.Random) -> SamplingParams:
        params: dict[str, Any] = {
            "max_tokens": rng.randint(5, self.max_new),
            "ignore_eos": rng.random() < 0.8,
            "temperature": 0.0,
            "seed": rng.getrandbits(62),
        }
        if rng.random() < 0.6:
            params["temperature"] = rng.choice((0.3, 1.0, 1.7))
            params["top_k"] = rng.choice((0, 0, 5, 50))
            params["top_p"] = rng.choice((1.0, 1.0, 0.95, 0.6))
            params["min_p"] = rng.choice((0.0, 0.0, 0.02))
        if rng.random() < 0.4:
            params["frequency_penalty"] = rng.choice((0.0, 0.4))
            params["presence_penalty"] = rng.choice((0.0, 0.7))
            params["repetition_penalty"] = rng.choice((1.0, 1.2))
        if rng.random() < 0.3:
            ids = rng.sample(range(self.vocab_size), 5)
            params["logit_bias"] = tuple((i, rng.uniform(-5, 5)) for i in ids)
        if rng.random() < 0.2:
            params["min_tokens"] = rng.randint(1, 10)
        if rng.random() < 0.5:
            params["logprobs"] = rng.randint(0, 5)
        return SamplingParams(**params)

    def _select(
        self, rng: random.Random, request: Request, cached: str
    ) -> tuple[Request, Selection]:
        """Draws what happens; where a chat goes on, the request becomes its next turn."""
        earlier: list[tuple[str, Request]] = []
        if cached == "cached: the same prompt":
            earlier = [(cached, Request(request.prompt_ids, self._params(rng)))]
        elif cached == "cached: a prefix of it":
            end = rng.randint(-(-len(request.prompt_ids) // 2), len(request.prompt_ids))
            tail = [rng.randrange(self.vocab_size) for _ in range(rng.randint(0, 20))]
            earlier = [(cached, Request(request.prompt_ids[:end] + tail, self._params(rng)))]
        elif cached == "cached: the chat's last turn":
            [first] = self.lonely.generate([request.prompt_ids], request.params)
            question = rng.choice(self.chats)
            earlier = [(cached, request)]
            prompt_ids = request.prompt_ids + first.token_ids + question
            request = Request(prompt_ids, self._params(rng))
        options = self._options(rng)
        # what waits behind a small budget makes a trial long, not hard
        most = min(MAX_NEIGHBOURS, options["max_step_tokens"] - 1)
        num_neighbours = rng.choice((0, rng.randint(1, 4), rng.randint(1, most)))
        twin = cached == "cached: while the other runs"
        is_short_of_pages = rng.random() < 0.4
        if twin or is_short_of_pages:
            num_neighbours = max(num_neighbours, 3)
        num_tokens = max(one.num_tokens for one in (request, *(one for _, one in earlier)))
        options["max_model_len"] = num_tokens + rng.randint(1, 64)
        capacity = options["max_model_len"]
        if not is_short_of_pages:
            capacity = (MAX_NEIGHBOURS + 2) * options["max_model_len"]
        num_pages = -(-capacity // options["page_size"])
        options["kv_cache_memory"] = (num_pages + 1) * options["page_size"] * self.bytes_per_token
        return request, Selection(
            options=options,
            replays=rng.random() < 0.4,
            num_neighbours=num_neighbours,
            is_short_of_pages=is_short_of_pages,
            earlier=earlier,
            twin=twin,
            restarts=rng.random() < 0.2,
        )

    def _options(self, rng: random.Random) -> dict[str, Any]:
        return {
            "page_size": rng.choice(PAGE_SIZES),
            "max_step_tokens": rng.choice(STEP_TOKENS),
            "run_ahead": rng.randint(0, 1),
            "max_num_seqs": rng.randint(MAX_NEIGHBOURS + 1, 64),
        }

    # -- what happens ----------------------------------------------------------------------

    def _engine(self, selection: Selection, **others: Any) -> Engine:
        engine = self._make(**selection.options | others)
        if selection.replays:
            engine.runner.record_steps()  # type: ignore[attr-defined]
        return engine

    def _run_selected(self, rng: random.Random, request: Request, selection: Selection) -> Answer:
        engine = self._engine(selection)
        kinds: set[str] = set()
        if selection.restarts:
            self._answer(engine, rng, request, selection, num_steps=rng.randint(1, 20))
            kinds.add("restarted")
            engine = self._engine(selection, max_num_seqs=rng.randint(1, 64))
        for _, one in selection.earlier:
            engine.add(one.prompt_ids, one.params, namespace=NAMESPACE)
            while engine.has_work:
                engine.step()
        answer = self._answer(engine, rng, request, selection)
        if engine.runner.graphs is not None and engine.runner.graphs.num_graphs:  # type: ignore[attr-defined]
            kinds.add("replayed steps")
        answer.kinds |= kinds
        return answer

    def _answer(
        self,
        engine: Engine,
        rng: random.Random,
        request: Request,
        selection: Selection,
        num_steps: int = MAX_STEPS,
    ) -> Answer:
        """The request's answer among neighbours; of its first steps only if ``num_steps`` ends."""
        answer = Answer()
        watched: list[Sequence] = []
        neighbours: list[int] = []
        seq_id = -1

        def find(started: list[Sequence]) -> None:
            watched.extend(seq for seq in started if seq.seq_id == seq_id)

        def join(one: Request) -> None:
            # the last in order yields its pages
            priority = -1 if selection.is_short_of_pages else 0
            prompt_ids = one.prompt_ids[: engine.info.max_model_len - 2]
            neighbours.append(
                engine.add(prompt_ids, one.params, namespace=NAMESPACE, priority=priority)
            )

        engine.on_start = find
        num_to_come = rng.randint(selection.num_neighbours, 2 * selection.num_neighbours)
        if selection.twin:
            join(Request(request.prompt_ids, self._params(rng)))
            for _ in range(rng.randint(1, 8)):
                engine.step()
        for _ in range(rng.randint(0, selection.num_neighbours)):
            join(self._neighbour(rng, selection.is_short_of_pages))
        seq_id = engine.add(request.prompt_ids, request.params, namespace=NAMESPACE)
        for _ in range(num_steps):
            num_others = engine.stats()["num_sequences"] - 1
            if num_to_come and num_others < selection.num_neighbours and rng.random() < 0.5:
                join(self._neighbour(rng, selection.is_short_of_pages))
                num_to_come -= 1
            if neighbours and rng.random() < 0.1:
                engine.abort(neighbours.pop(rng.randrange(len(neighbours))))
            for event in engine.step():
                if event.seq_id == seq_id:
                    answer.add(event)
            if watched:
                answer.kinds |= self._seen(engine, watched[0], selection)
            if answer.is_complete:
                break
        else:
            assert num_steps < MAX_STEPS, f"no answer after {MAX_STEPS} steps"
        for neighbour in neighbours:
            engine.abort(neighbour)
        while engine.has_work and answer.is_complete:
            engine.step()
        return answer

    @staticmethod
    def _seen(engine: Engine, seq: Sequence, selection: Selection) -> set[str]:
        """The kinds that the sequence has met so far."""
        stats = engine.stats()
        met = {
            "in a batch": stats["num_running"] > 1 and seq.row >= 0,
            "chunked": seq.num_cached < seq.num_computed < seq.num_prompt,
            "preempted": seq.num_preemptions > 0,
            "run ahead": engine.info.run_ahead > 0,
            "cached: while the other runs": selection.twin and seq.num_cached > 0,
        }
        for kind, one in selection.earlier:
            # a turn is cached only behind the end of its prompt, where the answer begins
            answered = kind == "cached: the chat's last turn"
            least = len(one.prompt_ids) if answered else 0
            met[kind] = seq.num_cached > least
        return {kind for kind, is_met in met.items() if is_met}


def write_wide_checkpoint(folder: Path) -> Path:
    """A random model whose bf16 products show how many rows they had; its folder."""
    return write_checkpoint(folder / "wide", WIDE, with_tokenizer=True)


def report(
    trials: Trials, numbers: range, say: Callable[[str], None]
) -> tuple[Counter[str], Counter[str]]:
    """Run trials; how many met each kind and how many of those differed, "all" among the kinds."""
    met: Counter[str] = Counter()
    differed: Counter[str] = Counter()
    for number in numbers:
        outcome = trials.run(number)
        kinds = {"all", *outcome.selected.kinds}
        met.update(kinds)
        if not outcome.is_same:
            differed.update(kinds)
            say(describe(number, outcome))
    return met, differed


def describe(number: int, outcome: Outcome) -> str:
    alone, selected = outcome.alone.token_ids, outcome.selected.token_ids
    pairs = enumerate(zip(alone, selected, strict=False))
    place = next((f"token {i}" for i, (a, b) in pairs if a != b), None)
    if place is None:
        place = "log-probabilities" if alone == selected else "the end"
    return (
        f"trial {number} differs at {place}: {', '.join(sorted(outcome.selected.kinds))}\n"
        f"  alone    {alone}\n  selected {selected}\n  repeat it with --first {number} --trials 1"
    )


def table(met: Counter[str], differed: Counter[str]) -> str:
    lines = [f"{'kind':30} {'trials':>6}  equal"]
    for kind in (*KINDS, "all"):
        equal = (
            "-" if not met[kind] else f"no: {differed[kind]} differ" if differed[kind] else "yes"
        )
        lines.append(f"{kind:30} {met[kind]:6}  {equal}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--model", default=str(TINY), help="folder of a checkpoint, or wide")
    parser.add_argument("--max-new", type=int, default=MAX_NEW, help="new tokens of a request")
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.trials)
    with tempfile.TemporaryDirectory() as folder:
        is_wide = arguments.model == "wide"
        model = write_wide_checkpoint(Path(folder)) if is_wide else Path(arguments.model)
        trials = Trials(arguments.dtype, folder=model, max_new=arguments.max_new)
        met, differed = report(trials, numbers, lambda line: print(line, flush=True))
    what = "wide" if is_wide else model.name
    print(f"{what} in {arguments.dtype}, trials {numbers[0]} to {numbers[-1]}")
    print(table(met, differed))
    return 1 if differed else 0


if __name__ == "__main__":
    sys.exit(main())
