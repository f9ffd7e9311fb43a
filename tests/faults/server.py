"""`fathom serve` with faults in it: ``python -m tests.faults.server --control SOCKET serve …``.

The engine process is that of `tests.faults.engine`. In the server itself a request brings a fault
along as a stop string: ``fault:PLACE:ERROR`` raises that error at that place for that request.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api.chat
import api.serve
from api.cli import main
from runtime import EngineClient, TextAssembler, Tokenizer


class Panic(BaseException):
    """As pyo3 raises it: no Exception, so that careless code does not catch it."""


ERRORS: dict[str, type[BaseException]] = {
    "ValueError": ValueError,
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "StopIteration": StopIteration,
    "Panic": Panic,
}
ENGINE = Path(__file__).resolve().with_name("engine_program.py")
PLACES = ("template", "tokenizer", "params", "assembler", "detokenizer", "stop")


def fault(place: str, error: str) -> str:
    """The stop string that makes a request fail so."""
    return f"fault:{place}:{error}"


def fail_at(place: str, stops: Any) -> None:
    for stop in stops or ():
        if stop.startswith(f"fault:{place}:"):
            raise ERRORS[stop.rsplit(":", 1)[1]](f"a fault in the {place}")


def before(place: str, function: Callable[..., Any], stops_of: Callable[..., Any]) -> Any:
    """``function`` that first looks whether its request brings a fault at ``place``."""

    @functools.wraps(function)
    def faulty(*arguments: Any, **options: Any) -> Any:
        fail_at(place, stops_of(*arguments, **options))
        return function(*arguments, **options)

    return faulty


def text_of(tokenizer: Any, messages: Any, *arguments: Any, **options: Any) -> list[str]:
    """A prompt's fault stands in its last message: encoding knows nothing of stop strings."""
    return [str(messages[-1]["content"])]


def install(control: str) -> None:
    program = [sys.executable, "-P", str(ENGINE), "--control", control]
    api.serve.EngineClient = functools.partial(EngineClient, program=program)  # type: ignore
    chat, tokenizer, assembler = api.chat, Tokenizer, TextAssembler
    tokenizer.encode_chat = before("tokenizer", tokenizer.encode_chat, text_of)  # type: ignore
    tokenizer._render = before("template", tokenizer._render, text_of)  # type: ignore
    chat.chat_sampling = before("params", chat.chat_sampling, lambda body, _: body.stop)  # type: ignore
    stops = lambda self, *_, **__: self._stops  # noqa: E731
    assembler.feed = before("detokenizer", assembler.feed, stops)  # type: ignore
    assembler._finish_section = before("stop", assembler._finish_section, stops)  # type: ignore
    assembler.__init__ = before(  # type: ignore
        "assembler", assembler.__init__, lambda self, tokenizer, params, **_: params.stop
    )


if __name__ == "__main__":
    _, flag, control, *rest = sys.argv
    assert flag == "--control", "see the first lines of this file"
    sys.argv = ["fathom", *rest]
    install(control)
    main()
