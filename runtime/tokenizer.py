"""Text to token ids and token ids to bytes, from a checkpoint's tokenizer.json.

Only byte-level BPE is read, which all DeepSeek checkpoints are: every token then is a run of bytes,
and text is made from bytes (`runtime.text`), never from per-token strings.

A *control token* is an added token that steers the model, such as ``<｜User｜>`` or ``<think>``.
The chat template writes them; what a client says in a chat can never become one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from runtime.chat_template import (
    RESERVED_VARIABLES,
    ChatRenderer,
    ChatTemplate,
    Message,
    find_template,
)
from runtime.chat_v32 import V32Chat
from runtime.config import (
    MAX_WIDTH,
    Fields,
    GenerationDefaults,
    is_there,
    one_line,
    read_file,
    read_json,
)
from runtime.control_tokens import ControlTokens, require_unicode
from runtime.errors import BadRequest, CheckpointError
from runtime.token_bound import TokenBound, byte_letters

THINK_START, THINK_END = "<think>", "</think>"
BUILT_IN_CHATS: dict[str, Callable[[], ChatRenderer]] = {"DeepseekV32ForCausalLM": V32Chat}
"""For architectures whose releases have no chat template."""
LONG_TEXT = 1 << 17
"""Characters of a prompt that cost nobody much to encode, whatever they are."""
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation."""

    token_ids: list[int]
    text: str
    thinking: bool  # the prompt ends inside a thought that the answer will continue


class Tokenizer:
    """Immutable once loaded; safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        add_bos: bool | None,
        chat: ChatRenderer | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        """``add_bos`` None leaves it to the tokenizer's own post-processor."""
        self._backend = backend
        self._chat = chat
        self.eos_token_ids = eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.token_bytes = _token_bytes(backend, {i: token.content for i, token in added.items()})
        self.num_tokens = len(self.token_bytes)
        self._bound = TokenBound(backend, self.token_bytes)
        self._hidden_ids = frozenset(i for i, token in added.items() if _is_hidden(token))
        ids = {token.content: i for i, token in added.items()}
        self.think_start_id = ids.get(THINK_START)
        self.think_end_id = ids.get(THINK_END)
        self._add_bos = add_bos
        self._bos_ids = _ids_of(backend, special_tokens.get("bos_token"))
        self._controls = ControlTokens(backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint.

        Raises `CheckpointError` if one is missing or broken, if the tokenizer is not byte-level
        BPE, or if it has more tokens than config.json has embeddings.
        """
        path = folder / "tokenizer.json"
        backend = _read_backend(path)
        _require_byte_level(backend, path)
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if is_there(config_path) else {}
        model_path = folder / "config.json"
        model = Fields(read_json(model_path), str(model_path))
        vocab_size = model.integer("vocab_size", high=MAX_WIDTH)
        num_tokens = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if num_tokens > vocab_size:
            raise CheckpointError(
                f"{path}: {num_tokens} tokens, but the model has {vocab_size} embeddings"
            )
        special_tokens = _special_tokens(config, str(config_path))
        eos_token_ids = (
            GenerationDefaults.load(folder, vocab_size).eos_token_ids
            or model.token_ids("eos_token_id", vocab_size)
            or _ids_of(backend, special_tokens.get("eos_token"))
        )
        add_bos = config.get("add_bos_token")
        return cls(
            backend,
            special_tokens=special_tokens,
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            chat=_find_chat(folder, config, special_tokens, model),
            eos_token_ids=frozenset(eos_token_ids),
        )

    # -- text to ids -----------------------------------------------------------------------------

    def encode(self, text: str, *, param: str = "prompt") -> list[int]:
        """Token ids of a raw prompt; control tokens in it count as such.

        The beginning-of-sequence token is put in front where the checkpoint asks for it, unless
        ``text`` brings its own. Raises `BadRequest` for text that is not valid Unicode.
        """
        require_unicode(text, param)
        if self._add_bos is None:
            return self._encode([text], param)[0].ids
        ids = self._encode([text], param, add_special_tokens=False)[0].ids
        if self._add_bos and tuple(ids[:1]) != self._bos_ids:
            return [*self._bos_ids, *ids]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
    ) -> ChatPrompt:
        """Render ``messages`` and encode the result.

        A control token's spelling inside a message, a tool or a variable is encoded as plain text.
        An assistant's text up to its last ``</think>`` is its ``reasoning_content``, and the
        template decides what of an earlier thought it repeats. The role ``developer`` means
        ``system``.

        Args:
            thinking: whether the answer is to begin with a thought, None for the template's
                choice. A template without such a switch does not notice.
            tools: functions the model may call, as OpenAI spells them.
            variables: more names for the template.
            max_model_len: refuse a prompt that is clearly longer before work is spent on it. One
                that is a little longer is encoded all the same.

        Raises `BadRequest` if the checkpoint has no template, the template fails, a variable has a
        reserved name, or text is not valid Unicode, and `ContextLengthExceeded`.
        """
        variables = dict(variables or {})
        if taken := sorted(RESERVED_VARIABLES & variables.keys()):
            raise BadRequest(
                f"chat_template_kwargs cannot set {taken[0]!r}: the server does",
                param=f"chat_template_kwargs.{taken[0]}",
                code="invalid_value",
            )
        if thinking is not None:  # DeepSeek's templates read the first, Qwen's the second
            variables |= {"thinking": thinking, "enable_thinking": thinking}
        variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        prepared = self._prepare(messages)
        if max_model_len is not None and _num_chars([prepared, variables]) > LONG_TEXT:
            # What the template drops, such as earlier thoughts, does not count.
            self._bound.check(self._render(prepared, variables), max_model_len)
        # The mark splits each control token a client spelt, so that no part of the rendered text
        # between two marks holds one; templates only move text around and keep the mark in place.
        mark = f"\ue000{secrets.randbelow(10**19)}\ue000"
        rendered = self._render(
            self._controls.marked(prepared, mark), self._controls.marked(variables, mark)
        )
        parts = [part for part in rendered.split(mark) if part]
        # Batches, unlike single texts, are encoded without Python's lock: other streams go on.
        encodings = self._encode(parts, "messages", add_special_tokens=False)
        token_ids = [token_id for encoding in encodings for token_id in encoding.ids]
        del encodings
        if len(rendered) > LONG_TEXT:
            _give_back_memory()
        return ChatPrompt(token_ids, "".join(parts), self.opens_thought(token_ids))

    def _encode(self, texts: list[str], param: str, **options: bool) -> list[tokenizers.Encoding]:
        try:
            return self._backend.encode_batch_fast(texts, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic: a regular expression that takes too many steps
            raise BadRequest(
                f"the model's tokenizer failed on this text: {one_line(str(error))}",
                param=param,
                code="tokenizer_error",
            ) from None

    def opens_thought(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thought: its last ``<think>`` is not closed."""
        if self.think_start_id is None:
            tail = b"".join(self.token_bytes[i] for i in token_ids[-16:])
            return tail.rstrip().endswith(THINK_START.encode())
        for token_id in reversed(token_ids):
            if token_id in (self.think_start_id, self.think_end_id):
                return token_id == self.think_start_id
        return False

    # -- ids to text -----------------------------------------------------------------------------

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model and is never shown as text."""
        return token_id in self._hidden_ids

    # -- rendering -------------------------------------------------------------------------------

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        prepared = [self._prepare_message(message) for message in messages]
        return prepared if self._chat is None else self._chat.prepare(prepared)

    def _prepare_message(self, message: Message) -> Message:
        prepared = dict(message)
        if prepared.get("role") == "developer":
            prepared["role"] = "system"
        content = prepared.get("content")
        if not content:  # templates tell an answer from calls by this
            prepared["content"] = None if prepared.get("tool_calls") else ""
        has_thought = prepared.get("role") == "assistant" and self.think_end_id is not None
        if has_thought and isinstance(content, str) and THINK_END in content:
            thought, _, prepared["content"] = content.rpartition(THINK_END)
            if not prepared.get("reasoning_content"):
                prepared["reasoning_content"] = thought.lstrip().removeprefix(THINK_START).strip()
        return prepared

    def _render(self, messages: list[Message], variables: dict[str, Any]) -> str:
        if self._chat is None:
            raise BadRequest(
                "This checkpoint ships no chat template, as base models do; put the one to use "
                "into its folder as chat_template.jinja",
                param="messages",
                code="template_error",
            )
        rendered = self._chat.render(messages, variables)
        require_unicode(rendered, "messages")
        return rendered


def _is_hidden(token: tokenizers.AddedToken) -> bool:
    return token.special or bool(re.fullmatch(r"<[｜|].*[｜|]>", token.content))


def _give_back_memory() -> None:
    """Of glibc's threads: each would keep the 300 MB that a megabyte took to encode."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _num_chars(value: Any) -> int:
    """Characters of all texts in ``value``, however deep."""
    num_chars = 0
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            num_chars += len(part)
        elif isinstance(part, Mapping):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            pending += part
    return num_chars


# -- reading the files ---------------------------------------------------------------------------


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(read_file(path).decode())
        backend.no_truncation()  # settings of training that some files keep
        backend.no_padding()
        return backend
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library reports some files by a panic, not an Exception
        raise CheckpointError(f"{path}: {one_line(str(error))}") from None


def _require_byte_level(backend: tokenizers.Tokenizer, path: Path) -> None:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if not isinstance(backend.model, tokenizers.models.BPE) or "ByteLevel" not in kinds:
        raise CheckpointError(
            f"{path}: {type(backend.model).__name__} model with {decoder.get('type')} decoder; "
            "only byte-level BPE is supported"
        )


def _find_chat(
    folder: Path, config: dict[str, Any], special_tokens: dict[str, str], model: Fields
) -> ChatRenderer | None:
    if (source := find_template(folder, config)) is not None:
        return ChatTemplate(source[0], special_tokens, source[1])
    architectures = model.raw("architectures", None)
    for architecture in architectures if isinstance(architectures, list) else ():
        if isinstance(architecture, str) and architecture in BUILT_IN_CHATS:
            return BUILT_IN_CHATS[architecture]()
    return None


def _special_tokens(config: dict[str, Any], where: str) -> dict[str, str]:
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


def _ids_of(backend: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    token_id = None if token is None else backend.token_to_id(token)
    return () if token_id is None else (token_id,)


def _token_bytes(backend: tokenizers.Tokenizer, added: dict[int, str]) -> list[bytes]:
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
