"""`fathom chat`: a conversation in the terminal, with the engine in this very process."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from runtime import (
    Engine,
    FathomError,
    GenerationDefaults,
    SamplingParams,
    TextAssembler,
    Tokenizer,
)

HELP = "Enter sends · Ctrl-C stops the answer · /clear forgets the conversation · Ctrl-D leaves"


def chat(
    engine: Engine, defaults: GenerationDefaults, console: Console, temperature: float | None
) -> None:
    """Read a line, stream the answer, again, until end of input."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    console.print(HELP, style="dim")
    messages: list[dict[str, Any]] = []
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except KeyboardInterrupt:
            console.print()
            continue
        except EOFError:
            console.print()
            return
        if not line:
            continue
        if line == "/clear":
            messages.clear()
            continue
        if line.startswith("/"):
            console.print(HELP, style="dim")
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(engine, tokenizer, messages, defaults, console, temperature)
        except KeyboardInterrupt:  # before the first token
            messages.pop()
            console.print()
            continue
        except FathomError as error:
            messages.pop()
            console.print(f"fathom: {error}", style="red", markup=False, highlight=False)
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(
    engine: Engine,
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    defaults: GenerationDefaults,
    console: Console,
    temperature: float | None,
) -> str:
    """Stream one answer, thoughts dimmed; Ctrl-C ends it and keeps what was said."""
    prompt = tokenizer.encode_chat(messages)
    recommended: dict[str, Any] = {
        "temperature": defaults.temperature if temperature is None else temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "repetition_penalty": defaults.repetition_penalty,
    }
    params = SamplingParams(**{k: value for k, value in recommended.items() if value is not None})
    assembler = TextAssembler(tokenizer, params, thinking=prompt.thinking)
    seq_id = engine.add(prompt.token_ids, params)
    answer, last_kind = "", ""
    try:
        while engine.has_work:
            for event in engine.step():
                if event.token_id is None:
                    raise FathomError("the engine could not finish this answer")
                for piece in assembler.feed(event.token_id, event.finish_reason):
                    if piece.kind != last_kind and last_kind:
                        console.print("\n")
                    last_kind = piece.kind
                    style = "dim" if piece.kind == "reasoning" else ""
                    console.print(piece.text, style=style, end="", markup=False, highlight=False)
                    if piece.kind == "content":
                        answer += piece.text
            sys.stdout.flush()
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    finally:
        engine.abort(seq_id)
    console.print()
    return answer
