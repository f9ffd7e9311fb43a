"""Clients turn thinking on and off, whatever they call it; V3.1's template has the switch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.app import ServerState
from runtime import Tokenizer
from tests.api.scripted import TINY, engine_of, post, scripted_state, serve
from tests.runtime.chat_templates import V31

ON, OFF = {"type": "enabled"}, {"type": "disabled"}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]

# what a client sends, and whether the answer then begins inside a thought
REQUESTS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"thinking": ON}, True),
    ({"thinking": OFF}, False),
    ({"thinking": {"type": "auto"}}, False),
    ({"enable_thinking": True}, True),
    ({"enable_thinking": False}, False),
    ({"reasoning": {"enabled": True}}, True),
    ({"reasoning": {"effort": "high"}}, True),
    ({"reasoning": {"effort": "none"}}, False),
    ({"reasoning_effort": "low"}, True),
    ({"reasoning_effort": "none"}, False),
    ({"chat_template_kwargs": {"thinking": True}}, True),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ({"chat_template_kwargs": {"thinking": False}}, False),
    ({"chat_template_kwargs": {"thinking": None, "note": "x"}}, False),
    # the first spelling that says something counts
    ({"thinking": {"type": "auto"}, "enable_thinking": True}, True),
    ({"thinking": OFF, "enable_thinking": True, "reasoning_effort": "high"}, False),
    ({"enable_thinking": True, "reasoning": {"enabled": False}}, True),
    ({"reasoning": {"enabled": True, "effort": "none"}, "reasoning_effort": "none"}, True),
    ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}, True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v31")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(TINY / name, folder)
    config = json.loads((TINY / "tokenizer_config.json").read_text()) | {"chat_template": V31}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, ServerState]]:
    state = scripted_state(Tokenizer.load(folder))
    with serve(state) as base:
        yield base, state


@pytest.mark.parametrize(("fields", "thinks"), REQUESTS)
def test_switch(server: tuple[str, ServerState], fields: dict[str, Any], thinks: bool) -> None:
    base, state = server
    engine = engine_of(state)
    engine.say("fine", thought="Let me see.")
    response = post(base, {"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    prompt_ids, _ = engine.submitted[-1]
    tokenizer = state.tokenizer
    assert prompt_ids[-1] == (tokenizer.think_start_id if thinks else tokenizer.think_end_id)
    # the script says </think>: the end of a thought, or a stray token
    message = response.json()["choices"][0]["message"]
    assert (message.get("reasoning_content") is not None) is thinks
    assert message["content"].endswith("fine")


def test_thoughts_come_back_in_both_spellings(server: tuple[str, ServerState]) -> None:
    """The template drops them, but a client that sends them is not refused."""
    base, state = server
    engine = engine_of(state)
    engine.say("fine")
    prompts = []
    for thought in ({"reasoning_content": "Hm."}, {"reasoning": "Hm."}, {}):
        answer = {"role": "assistant", "content": "hi", **thought}
        assert post(base, {"messages": [*HELLO, answer, *HELLO]}).status_code == 200
        prompts.append(engine.submitted[-1][0])
    assert prompts[0] == prompts[1] == prompts[2]
