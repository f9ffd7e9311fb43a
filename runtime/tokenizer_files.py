"""What `runtime.tokenizer` reads of a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from runtime.chat_template import ChatRenderer, ChatTemplate, find_template
from runtime.chat_v32 import V32Chat
from runtime.config import Fields, one_line, read_file
from runtime.errors import CheckpointError
from runtime.token_bound import byte_letters

BUILT_IN_CHATS: dict[str, Callable[[], ChatRenderer]] = {"DeepseekV32ForCausalLM": V32Chat}
"""For architectures whose releases have no chat template."""
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(read_file(path).decode())
        backend.no_truncation()  # settings of training that some files keep
        backend.no_padding()
        return backend
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library reports some files by a panic, not an Exception
        raise CheckpointError(f"{path}: {one_line(str(error))}") from None


def require_byte_level(backend: tokenizers.Tokenizer, path: Path) -> None:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if not isinstance(backend.model, tokenizers.models.BPE) or "ByteLevel" not in kinds:
        raise CheckpointError(
            f"{path}: {type(backend.model).__name__} model with {decoder.get('type')} decoder; "
            "only byte-level BPE is supported"
        )


def find_chat(
    folder: Path, config: dict[str, Any], special_tokens: dict[str, str], model: Fields
) -> ChatRenderer | None:
    if (source := find_template(folder, config)) is not None:
        return ChatTemplate(source[0], special_tokens, source[1])
    architectures = model.raw("architectures", None)
    for architecture in architectures if isinstance(architectures, list) else ():
        if isinstance(architecture, str) and architecture in BUILT_IN_CHATS:
            return BUILT_IN_CHATS[architecture]()
    return None


def read_special_tokens(config: dict[str, Any], where: str) -> dict[str, str]:
    """``bos_token`` and its kin, each spelt as a text or as an object with ``content``."""
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {name}: not a text")
        tokens[name] = value
    return tokens


def ids_of(backend: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    token_id = None if token is None else backend.token_to_id(token)
    return () if token_id is None else (token_id,)


def token_bytes(backend: tokenizers.Tokenizer, added: dict[int, str]) -> list[bytes]:
    """The bytes of every id; none for an id that no token has."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = backend.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (max(vocab.values(), default=-1) + 1)
    for text, token_id in vocab.items():
        if token_id in added or any(char not in byte_of for char in text):
            token_bytes[token_id] = added.get(token_id, text).encode()
        else:
            token_bytes[token_id] = bytes(byte_of[char] for char in text)
    return token_bytes
