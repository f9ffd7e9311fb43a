from __future__ import annotations

import pytest

from runtime import Tokenizer
from tests.api.scripted import TINY


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)
