from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from api.app import ServerState
from runtime import Tokenizer
from tests.api.scripted import TINY, ScriptedEngine, engine_of, scripted_state, serve


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


@pytest.fixture
def state(tokenizer: Tokenizer) -> ServerState:
    return scripted_state(tokenizer)


@pytest.fixture
def engine(state: ServerState) -> ScriptedEngine:
    return engine_of(state)


@pytest.fixture
def base(state: ServerState) -> Iterator[str]:
    with serve(state) as address:
        yield address


@pytest.fixture(scope="module")
def refusing(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedEngine]]:
    """One server for many requests that are refused, which leaves nothing of them behind."""
    state = scripted_state(tokenizer)
    with serve(state) as address:
        yield address, engine_of(state)


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=20) as client:
        yield client
