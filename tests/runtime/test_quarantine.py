"""Strikes, suspects and convicts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Quarantined
from runtime.generation import Generation
from runtime.quarantine import Quarantine, prompt_digest
from runtime.request import FinishReason
from runtime.submissions import Submission, Submissions

KILLER, POPULAR, OTHER = [6, 6, 6], [1, 2], [3]


def test_a_digest_is_of_the_ids_and_their_borders() -> None:
    prompts = [[1, 23], [12, 3], [123], [1, 2, 3], [256], [1], [0, 1], [1, 0]]
    assert len({prompt_digest(prompt) for prompt in prompts}) == len(prompts)
    assert prompt_digest([1, 2, 3]) == prompt_digest((1, 2, 3))


def test_the_second_strike_convicts_and_a_good_end_clears() -> None:
    quarantine = Quarantine()
    killer, popular = prompt_digest(KILLER), prompt_digest(POPULAR)
    quarantine.strike([killer, popular, popular])  # one death, however many copies ran
    assert quarantine.is_suspect(killer)
    assert quarantine.is_suspect(popular)
    assert not quarantine.is_quarantined(killer)
    assert not quarantine.is_quarantined(popular)
    quarantine.acquit(popular)
    assert not quarantine.is_suspect(popular)
    quarantine.strike([killer, popular])
    assert quarantine.is_quarantined(killer)
    assert not quarantine.is_quarantined(popular)


def test_the_longest_without_a_strike_is_forgotten_first() -> None:
    quarantine = Quarantine(max_prompts=3)
    a, b, c, d = (prompt_digest([i]) for i in range(4))
    for digest in (a, b, c, a, d):
        quarantine.strike([digest])
    assert len(quarantine) == 3
    assert quarantine.is_quarantined(a)
    assert not quarantine.is_suspect(b)
    assert quarantine.is_suspect(c)
    assert quarantine.is_suspect(d)


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


def test_suspects_run_one_at_a_time_and_others_pass_them() -> None:
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
    assert scene.submit(POPULAR)  # one strike again
    with pytest.raises(Quarantined, match="Do not send"):
        scene.submit(KILLER)


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
    st.lists(
        st.tuples(st.sampled_from(["submit", "end", "remove", "left", "die"]), st.integers(0, 4))
    )
)
def test_never_two_suspects_in_an_engine_and_nothing_is_lost(
    actions: list[tuple[str, int]],
) -> None:
    """Random lives, against sets kept by the test."""
    scene = Scene()
    strikes: dict[int, int] = {}
    inside: dict[int, int] = {}  # seq_id → prompt, until the engine let go
    running: set[int] = set()
    waiting: dict[int, int] = {}
    for action, number in actions:
        if action == "submit":
            if strikes.get(number, 0) >= 2:
                with pytest.raises(Quarantined):
                    scene.submit([number])
            else:
                waiting[scene.submit([number])] = number
        elif action == "end" and running:
            seq_id = min(running)
            running.remove(seq_id)
            strikes.pop(inside.pop(seq_id), None)
            scene.finish(seq_id)
        elif action == "remove" and running:
            seq_id = max(running)
            running.remove(seq_id)
            scene.submissions.remove(seq_id)
        elif action == "left" and set(inside) - running:
            seq_id = min(set(inside) - running)
            del inside[seq_id]
            scene.submissions.left(seq_id)
        elif action == "die":
            for prompt in set(inside.values()):
                strikes[prompt] = strikes.get(prompt, 0) + 1
            waiting = {i: prompt for i, prompt in waiting.items() if strikes.get(prompt, 0) < 2}
            inside, running = {}, set()
            scene.submissions.bury()
        suspects_before = [prompt for prompt in inside.values() if prompt in strikes]
        for seq_id in scene.send_all():
            inside[seq_id] = waiting.pop(seq_id)
            running.add(seq_id)
            if inside[seq_id] in strikes:
                assert not suspects_before, "a second suspect was sent"
                suspects_before.append(inside[seq_id])
        assert all(prompt in strikes for prompt in waiting.values())
        assert not waiting or suspects_before, "one was held back for nobody"
        assert scene.submissions.num_waiting == len(waiting)
        assert scene.submissions.num_running == len(running)
