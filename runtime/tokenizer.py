"""Text to token ids and token ids to bytes, from a checkpoint's tokenizer.json.

Only byte-level BPE is read, which all DeepSeek checkpoints are: every token then is a run of bytes,
and text is made from bytes (`runtime.text`), never from per-token strings.

A *control token* is an added token that steers the model, such as ``<｜User｜>`` or ``<think>``.
The chat template writes them; what a client says in a chat can never become one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers

from runtime.chat_messages import num_chars, prepare_message, with_open_thought
from runtime.chat_template import (
    RESERVED_VARIABLES,
    ChatRenderer,
    Message,
)
from runtime.config import (
    MAX_WIDTH,
    Fields,
    GenerationDefaults,
    is_there,
    one_line,
    read_json,
)
from runtime.control_tokens import THINK_END, THINK_START, ControlTokens, require_unicode
from runtime.errors import BadRequest, CheckpointError
from runtime.grammar import GrammarVocabulary
from runtime.memory import give_back_memory
from runtime.token_bound import TokenBound
from runtime.tokenizer_files import (
    find_chat,
    ids_of,
    read_backend,
    read_special_tokens,
    require_byte_level,
    token_bytes,
)
from runtime.tool_prompts import ToolChat, ToolStyle

INFILL_MARKERS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
"""What stands before a prefix, between it and its suffix, and behind both; DeepSeek's and Qwen's.
"""
LONG_TEXT = 1 << 17
"""Characters of a prompt that cost nobody much to encode, whatever they are."""


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
        self._chat = None if chat is None else ToolChat(chat)
        added = backend.get_added_tokens_decoder()
        self.token_bytes = token_bytes(backend, {i: token.content for i, token in added.items()})
        self.num_tokens = len(self.token_bytes)
        # what the tokenizer lacks is padding of the model's head and never drawn
        self.eos_token_ids = frozenset(i for i in eos_token_ids if i < self.num_tokens)
        self._bound = TokenBound(backend, self.token_bytes)
        self._hidden_ids = frozenset(i for i, token in added.items() if _is_hidden(token))
        ids = {token.content: i for i, token in added.items()}
        self.think_start_id = ids.get(THINK_START)
        self.think_end_id = ids.get(THINK_END)
        self._add_bos = add_bos
        self._bos = special_tokens.get("bos_token") or ""
        self._bos_ids = ids_of(backend, special_tokens.get("bos_token"))
        self._infill = next((m for m in INFILL_MARKERS if ids.keys() >= set(m)), None)
        self._controls = ControlTokens(backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint.

        Raises `CheckpointError` if one is missing or broken, if the tokenizer is not byte-level
        BPE, or if it has more tokens than config.json has embeddings.
        """
        path = folder / "tokenizer.json"
        backend = read_backend(path)
        require_byte_level(backend, path)
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
        special_tokens = read_special_tokens(config, str(config_path))
        eos_token_ids = (
            GenerationDefaults.load(folder, vocab_size).eos_token_ids
            or model.token_ids("eos_token_id", vocab_size)
            or ids_of(backend, special_tokens.get("eos_token"))
        )
        add_bos = config.get("add_bos_token")
        return cls(
            backend,
            special_tokens=special_tokens,
            add_bos=add_bos if isinstance(add_bos, bool) else None,
            chat=find_chat(folder, config, special_tokens, model),
            eos_token_ids=frozenset(eos_token_ids),
        )

    # -- text to ids -----------------------------------------------------------------------------

    def encode(
        self,
        text: str,
        *,
        param: str = "prompt",
        add_special_tokens: bool = True,
        max_model_len: int | None = None,
    ) -> list[int]:
        """Token ids of a raw prompt; control tokens in it count as such.

        With ``add_special_tokens`` the beginning-of-sequence token is put in front where the
        checkpoint asks for it, unless ``text`` brings its own. A text that is clearly longer than
        ``max_model_len`` is refused before work is spent on it.

        Raises `BadRequest` for text that is not valid Unicode, and `ContextLengthExceeded`.
        """
        require_unicode(text, param)
        if max_model_len is not None and len(text) > LONG_TEXT:
            self._bound.check(text, max_model_len, param=param)
        if self._add_bos is None:
            return self._encode([text], param, add_special_tokens=add_special_tokens)[0].ids
        ids = self._encode([text], param, add_special_tokens=False)[0].ids
        if self._add_bos and add_special_tokens and tuple(ids[:1]) != self._bos_ids:
            return [*self._bos_ids, *ids]
        return ids

    def num_in_front(self, text: str, token_ids: Sequence[int]) -> int:
        """Tokens that `encode` put in front of those of ``text``: 1 if that is so, else 0."""
        has_bos = bool(self._bos_ids) and tuple(token_ids[:1]) == self._bos_ids
        return int(has_bos and not text.startswith(self._bos))

    def infill(self, prefix: str, suffix: str) -> str:
        """The raw prompt that asks for what goes between both. Raises `BadRequest` if the model
        has no tokens for that.
        """
        if self._infill is None:
            first = " or ".join(markers[0] for markers in INFILL_MARKERS)
            raise BadRequest(
                "This model cannot fill in text before a suffix: its tokenizer has no token "
                f"{first}. Leave suffix out.",
                param="suffix",
                code="unsupported_value",
            )
        begin, hole, end = self._infill
        return f"{begin}{prefix}{hole}{suffix}{end}"

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
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
            continue_final_message: end the prompt with the text of the last message, an
                assistant's, so that the answer goes on with it. If it has a thought, that comes
                before its text; the answer goes on with the thought if there is no text.
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
        if continue_final_message:
            return self._encode_continued(messages, variables, thinking, max_model_len)
        prepared = self._prepare(messages)
        if max_model_len is not None and num_chars([prepared, variables]) > LONG_TEXT:
            # What the template drops, such as earlier thoughts, does not count.
            self._bound.check(self._render(prepared, variables), max_model_len)
        mark = _new_mark()
        rendered = self._render(
            self._controls.marked(prepared, mark), self._controls.marked(variables, mark)
        )
        return self._encode_marked(rendered, mark)

    def _encode_continued(
        self,
        messages: Sequence[Message],
        variables: dict[str, Any],
        thinking: bool | None,
        max_model_len: int | None,
    ) -> ChatPrompt:
        """A conversation whose last message the answer goes on with."""
        *before, last = self._prepare([*messages[:-1], with_open_thought(messages[-1])])
        text = last.get("content") or ""
        thought = (last.get("reasoning_content") or "") if thinking is not False else ""
        if max_model_len is not None and num_chars([before, last, variables]) > LONG_TEXT:
            self._bound.check(self._render([*before, last], variables) + thought, max_model_len)
        mark, end = _new_mark(), _new_mark()
        marked = partial(self._controls.marked, mark=mark)
        if thought and before and self.think_end_id is not None:
            # No template shows a thought that is not over; few show one that is.
            switches = {"thinking": True, "enable_thinking": True, "add_generation_prompt": True}
            opened = self._render(marked(before), marked(variables) | switches)
            if not opened.rstrip().endswith(THINK_START):
                opened += f"{THINK_START}\n"
            is_spaced = opened.endswith("\n")
            if text and is_spaced:
                thought, text = marked(thought.rstrip("\n")), marked(text.lstrip("\n"))
                rendered = f"{opened}{thought}\n{THINK_END}\n\n{text}"
            else:
                rendered = opened + marked(thought) + (THINK_END + marked(text) if text else "")
            return self._encode_marked(rendered, mark)
        last["content"] = text + end
        shown, found, _ = self._render(marked([*before, last]), marked(variables)).rpartition(end)
        if not found:
            raise BadRequest(
                "The model's chat template does not show the text of the last message, so it "
                "cannot be continued",
                param="messages",
                code="template_error",
            )
        return self._encode_marked(shown, mark)

    def _encode_marked(self, rendered: str, mark: str) -> ChatPrompt:
        """Encode a rendered prompt in parts.

        The mark splits each control token a client spelt, so that no part of the rendered text
        between two marks holds one; templates only move text around and keep the mark in place.
        """
        parts = [part for part in rendered.split(mark) if part]
        # Batches, unlike single texts, are encoded without Python's lock: other streams go on.
        encodings = self._encode(parts, "messages", add_special_tokens=False)
        token_ids = [token_id for encoding in encodings for token_id in encoding.ids]
        del encodings
        if len(rendered) > LONG_TEXT:
            give_back_memory()  # glibc's threads would keep the 300 MB that a megabyte took
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

    @cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The tokens as grammars see them, made when first needed."""
        thoughts = (self.think_start_id, self.think_end_id)
        return GrammarVocabulary(
            self.token_bytes,
            control_ids=self._hidden_ids.union(i for i in thoughts if i is not None),
            end_ids=self.eos_token_ids,
            encode=self.encode_text,
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of part of an answer; control tokens in it count as such."""
        return self._encode([text], "prompt", add_special_tokens=False)[0].ids

    def opens_thought(self, token_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thought: its last ``<think>`` is not closed."""
        if self.think_start_id is None:
            tail = b"".join(self.token_bytes[i] for i in token_ids[-16:])
            return tail.rstrip().endswith(THINK_START.encode())
        for token_id in reversed(token_ids):
            if token_id in (self.think_start_id, self.think_end_id):
                return token_id == self.think_start_id
        return False

    def token_id(self, token: str) -> int | None:
        """The id of a control token, None if there is no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def tool_style(self) -> ToolStyle:
        """What the chat template does with functions and calls."""
        return ToolStyle(None) if self._chat is None else self._chat.style

    # -- ids to text -----------------------------------------------------------------------------

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model and is never shown as text."""
        return token_id in self._hidden_ids

    # -- rendering -------------------------------------------------------------------------------

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        has_thoughts = self.think_end_id is not None
        prepared = [prepare_message(message, has_thoughts=has_thoughts) for message in messages]
        return prepared if self._chat is None else self._chat.prepare(prepared)

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
    if token.content in (THINK_START, THINK_END):  # a raw completion shows its thoughts
        return False
    return token.special or bool(re.fullmatch(r"<[｜|].*[｜|]>", token.content))


def _new_mark() -> str:
    """A text that no client can have sent."""
    return f"\ue000{secrets.randbelow(10**19)}\ue000"
