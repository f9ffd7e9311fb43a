"""Strikes, suspects and convicts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Quarantined
from runtime.generation import Generation
from runtime.quarantine import CONVICTION_SECONDS, STRIKE_SECONDS, Quarantine, prompt_digest
from runtime.request import FinishReason
from runtime.submissions import PROBATION_TOKENS, Submission, Submissions

KILLER, POPULAR, OTHER = [6, 6, 6], [1, 2], [3]


def test_a_digest_is_of_the_ids_and_their_borders() -> None:
    prompts = [[1, 23], [12, 3], [123], [1, 2, 3], [256], [1], [0, 1], [1, 0]]
    assert len({prompt_digest(prompt) for prompt in prompts}) == len(prompts)
    assert prompt_digest([1, 2, 3]) == prompt_digest((1, 2, 3))


def test_strikes_add_up_and_a_good_end_clears() -> None:
    quarantine = Quarantine()
    killer, popular = prompt_digest(KILLER), prompt_digest(POPULAR)
    assert not quarantine
    quarantine.strike([killer, popular, popular], now=0.0)  # one death, however many copies ran
    assert quarantine
    for digest in (killer, popular):
        assert quarantine.is_suspect(digest, 1.0)
        assert not quarantine.is_grave(digest, 1.0)
    quarantine.acquit(popular)
    assert not quarantine.is_suspect(popular, 1.0)
    quarantine.strike([killer, popular], now=2.0)
    assert quarantine.is_grave(killer, 3.0)
    assert not quarantine.is_grave(popular, 3.0)
    quarantine.convict(killer, now=4.0)
    assert quarantine.is_quarantined(killer, 5.0)
    assert not quarantine.is_quarantined(popular, 5.0)


def test_a_strike_is_forgotten_after_an_hour_and_a_conviction_after_a_day() -> None:
    quarantine = Quarantine()
    digest = prompt_digest(KILLER)
    quarantine.strike([digest], now=0.0)
    assert quarantine.is_suspect(digest, STRIKE_SECONDS - 1)
    assert not quarantine.is_suspect(digest, STRIKE_SECONDS)
    quarantine.strike([digest], now=STRIKE_SECONDS)
    assert not quarantine.is_grave(digest, STRIKE_SECONDS)
    quarantine.convict(digest, now=STRIKE_SECONDS)
    assert quarantine.is_quarantined(digest, STRIKE_SECONDS + CONVICTION_SECONDS - 1)
    assert not quarantine.is_quarantined(digest, STRIKE_SECONDS + CONVICTION_SECONDS)


def test_the_longest_without_a_strike_is_forgotten_first() -> None:
    quarantine = Quarantine(max_prompts=3)
    a, b, c, d = (prompt_digest([i]) for i in range(4))
    for digest in (a, b, c, a, d):
        quarantine.strike([digest], now=0.0)
    assert quarantine.is_grave(a, 0.0)
    assert not quarantine.is_suspect(b, 0.0)
    assert quarantine.is_suspect(c, 0.0)
    assert quarantine.is_suspect(d, 0.0)
    for digest in (a, b, c, d):
        quarantine.convict(digest, now=0.0)
    assert [quarantine.is_quarantined(one, 0.0) for one in (a, b, c, d)] == [
        False,
        True,
        True,
        True,
    ]


class Scene:
    """Submissions, and what an engine of a test says about them."""

    def __init__(self) -> None:
        self.submissions = Submissions()
        self.next_id = 0

    def submit(self, prompt: list[int]) -> int:
        seq_id = self.next_id
        message = {"seq_id": seq_id, "prompt_ids": prompt}
        self.submissions.add(Submission(Generation(seq_id, lambda _: None), message, 0.0))
        self.next_id += 1
        return seq_id

    def send_all(self, *, start: bool = True) -> list[int]:
        sent = []
        while (message := self.submissions.send_next()) is not None:
            sent.append(message["seq_id"])
            if start:
                self.submissions.start(message["seq_id"], 0)
        return sent

    def finish(self, seq_id: int) -> None:
        self.submissions.finish(seq_id, FinishReason.STOP)


def test_suspects_are_watched_one_at_a_time_and_others_pass_them() -> None:
    scene = Scene()
    for prompt in (KILLER, POPULAR):
        scene.submit(prompt)
    scene.send_all()
    scene.submissions.bury()  # one strike each
    first, second = scene.submit(POPULAR), scene.submit(KILLER)
    third, innocent = scene.submit(POPULAR), scene.submit(OTHER)
    assert scene.send_all() == [first, innocent]
    scene.finish(first)  # the popular prompt is cleared, so its copy is no suspect any more
    assert scene.send_all() == [second, third]
    assert scene.submissions.bury() == 3
    assert scene.submit(POPULAR)  # it was not the one that was watched
    with pytest.raises(Quarantined, match="Do not send"):
        scene.submit(KILLER)


def test_a_suspect_that_answers_makes_room_for_the_next_long_before_its_end() -> None:
    scene = Scene()
    prompts = [[number] for number in range(20)]
    for prompt in prompts:
        scene.submit(prompt)
    scene.send_all()
    scene.submissions.bury()  # from outside; every client asks again
    ids = [scene.submit(prompt) for prompt in prompts]
    for seq_id in ids:
        assert scene.send_all() == [seq_id]
        for _ in range(PROBATION_TOKENS):
            assert scene.send_all() == []
            scene.submissions.draw(seq_id)
    assert scene.submissions.num_running == 20


def test_who_was_there_at_several_deaths_is_watched_to_its_end() -> None:
    """It kills late: its probation was over both times, and nobody else may pay for it."""
    scene = Scene()
    scene.submit(KILLER)
    scene.submit(POPULAR)
    for _ in range(2):
        for seq_id in scene.send_all():
            for _ in range(PROBATION_TOKENS):
                scene.submissions.draw(seq_id)
        for seq_id in scene.send_all():
            for _ in range(PROBATION_TOKENS):
                scene.submissions.draw(seq_id)
        assert scene.submissions.bury() == 2
        killer, popular = scene.submit(KILLER), scene.submit(POPULAR)
    assert scene.send_all() == [killer]
    for _ in range(10 * PROBATION_TOKENS):
        scene.submissions.draw(killer)
    assert scene.send_all() == []
    scene.submissions.bury()
    with pytest.raises(Quarantined):
        scene.submit(KILLER)
    assert scene.send_all() == [popular]


def test_a_suspect_that_dies_with_the_engine_makes_room_for_the_next() -> None:
    scene = Scene()
    for prompt in (KILLER, POPULAR):
        scene.submit(prompt)
    scene.send_all()
    scene.submissions.bury()
    killer, popular = scene.submit(KILLER), scene.submit(POPULAR)
    assert scene.send_all() == [killer]
    scene.submissions.bury()
    assert scene.send_all() == [popular]


def test_one_that_left_is_still_blamed_until_the_engine_let_go_of_it() -> None:
    scene = Scene()
    for _ in range(2):
        killer = scene.submit(KILLER)
        scene.send_all()
        _, told = scene.submissions.remove(killer)
        assert told
        assert scene.submissions.engine_has_work
        scene.submissions.bury()
    with pytest.raises(Quarantined):
        scene.submit(KILLER)

    scene = Scene()
    for _ in range(2):
        left = scene.submit(POPULAR)
        scene.send_all()
        scene.submissions.remove(left)
        scene.submissions.left(left)
        assert not scene.submissions.engine_has_work
        scene.submissions.bury()
    assert scene.submit(POPULAR)


def test_an_answer_that_was_cut_at_a_stop_string_clears_its_prompt() -> None:
    scene = Scene()
    scene.submit(POPULAR)
    scene.send_all()
    scene.submissions.bury()
    answered = scene.submit(POPULAR)
    scene.send_all()
    for _ in range(PROBATION_TOKENS):
        scene.submissions.draw(answered)
    scene.submissions.remove(answered)
    scene.submissions.left(answered)
    again, twin = scene.submit(POPULAR), scene.submit(POPULAR)
    assert scene.send_all() == [again, twin]


def test_what_had_not_started_is_not_blamed_and_keeps_its_order() -> None:
    scene = Scene()
    ids = [scene.submit([i + 1]) for i in range(5)]
    scene.send_all(start=False)
    scene.submissions.start(ids[1], 0)
    assert scene.submissions.bury() == 1
    assert scene.send_all(start=False) == [0, 2, 3, 4]
    scene.submissions.bury()
    assert scene.submit([1])


@given(
    kill_at=st.integers(0, 3 * PROBATION_TOKENS),
    num_others=st.integers(0, 6),
    num_rows=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
def test_a_killer_is_convicted_soon_and_nobody_else(
    kill_at: int, num_others: int, num_rows: int, order: random.Random
) -> None:
    """An engine that one prompt kills each time after ``kill_at`` tokens; every client insists."""
    scene = Scene()
    answer = 4 * PROBATION_TOKENS
    prompts = [KILLER, *([10 + number] for number in range(num_others))]
    deaths, wanted = 0, list(prompts)
    while True:
        order.shuffle(wanted)
        tokens: dict[int, tuple[list[int], int]] = {}
        for prompt in wanted:
            try:
                tokens[scene.submit(prompt)] = prompt, 0
            except Quarantined:
                assert prompt == KILLER
        if len(tokens) < len(wanted):
            break
        running: list[int] = []
        died = False
        while tokens and not died:
            while len(running) < num_rows and (message := scene.submissions.send_next()):
                running.append(message["seq_id"])
                scene.submissions.start(message["seq_id"], 0)
            assert running, "everybody waits"
            for seq_id in list(running):
                prompt, drawn = tokens[seq_id]
                if prompt == KILLER and drawn == kill_at:
                    died = True
                    break
                scene.submissions.draw(seq_id)
                tokens[seq_id] = prompt, drawn + 1
                if drawn + 1 == answer:
                    scene.finish(seq_id)
                    running.remove(seq_id)
                    del tokens[seq_id]
        assert died
        deaths += 1
        assert deaths <= 3
        waiting = [tokens[seq_id][0] for seq_id in tokens if seq_id not in running]
        scene.submissions.bury()
        for seq_id in scene.submissions.all_ids():
            scene.submissions.remove(seq_id)  # who waited asks anew too, to keep this simple
        wanted = [tokens[seq_id][0] for seq_id in running] + waiting
    assert deaths == 2 or num_others
