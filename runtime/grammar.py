"""What an answer may look like: a JSON schema, a regular expression or a grammar, as llguidance
compiles it to masks over a tokenizer's tokens.

What a client sends is bounded before the library sees it. Its compiler recurses as deep as the
rules refer to one another, and a stack that overflows ends the process: `MAX_LEVELS` is below half
of what overflowed 8 MiB in trials. Nor can it be stopped while it computes what several expressions
have in common, which may take for ever; see `grammar_overlap`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args
from urllib.parse import unquote

import llguidance
import numpy as np

from runtime.config import one_line
from runtime.errors import BadRequest
from runtime.grammar_overlap import MAX_EXPRESSIONS, why_too_much

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
MAX_GRAMMAR_CHARS = 1 << 16
MAX_LEVELS = 1000
"""Nesting of the parts of a grammar, added up over all parts that others refer to."""
MAX_PROPERTIES = 1000
"""Of all objects of a schema; time to compile grows with their square."""
MAX_SCHEMA_ITEMS = 10_000
"""What the parser may keep for one byte of a schema's answer; a property that may be next is 4."""
MAX_CHECK_SECONDS = 2.0
"""Of a core. The engine compiles a grammar again, between two steps of all sequences."""
NUM_TRIAL_TOKENS = 16
"""Some grammars compile, and fail at the second token."""
WHITESPACE = r" |\r?\n[ \t]{0,64}"
"""Between two tokens of JSON; were it free, a model might write blanks until its context ends."""
LARK_LITERAL = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
EMBEDDED_SCHEMA = re.compile(r"%json\s*(?=\{)")


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of an answer. ``text`` is the schema as JSON, the expression or the grammar.

    Raises `BadRequest` for an unknown kind and for a text that is too long.
    """

    kind: GrammarKind
    text: str = ""  # unused by json_object

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise BadRequest(
                f"a grammar's kind must be one of {', '.join(get_args(GrammarKind))}, "
                f"got {str(self.kind)[:40]!r}",
                param="response_format",
                code="invalid_value",
            )
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise BadRequest(
                f"response_format may have {MAX_GRAMMAR_CHARS} characters, got {len(self.text)}",
                param="response_format",
                code="string_above_max_length",
            )


class GrammarVocabulary:
    """A tokenizer's tokens as grammars see them. `prepare` spares the first grammar a second."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        control_ids: Iterable[int],
        end_ids: Iterable[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        """``control_ids`` are no text: only a grammar that names one in ``<>`` allows it.

        ``encode`` spells text that the grammar leaves no choice about, as the model would.
        """
        self.end_ids = sorted(end_ids)
        self._token_bytes = token_bytes
        self._controls = frozenset(control_ids) | frozenset(self.end_ids)
        self._encode = encode
        self._ids = {
            spelling: token_id
            for token_id, spelling in enumerate(token_bytes)
            if spelling and token_id not in self._controls
        }
        self._max_bytes = max(map(len, self._ids), default=1)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_TokenizerAdapter(self)),
            n_vocab=len(self._token_bytes),
            eos_token=self.end_ids,
        )

    def prepare(self) -> None:
        """Build now what the first grammar would wait for: 0.8 s and 60 MiB for 128,000 tokens.

        Python's lock is held meanwhile. Raises nothing: what fails here fails in `compile` again.
        """
        try:
            _ = self._tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the library is no Exception
            pass

    def compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        """A matcher at the start of an answer. Raises `BadRequest` for what it cannot follow."""
        if not self.end_ids:
            refuse("this checkpoint names no end-of-sequence token, which a format needs")
        max_items = MAX_SCHEMA_ITEMS if grammar.kind == "json_schema" else None
        try:
            matcher = llguidance.LLMatcher(
                self._tokenizer,
                _source(grammar),
                log_level=0,
                limits=llguidance.LLParserLimits(max_items_in_row=max_items, verbose_errors=False),
            )
            if not matcher.is_error():
                matcher.compute_bitmask()
            error = matcher.get_error()
        except (BadRequest, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:  # a panic of the library is no Exception
            error = str(failure) or type(failure).__name__
        if error.startswith("NoExtension"):
            error = "no answer fits it"
        if error:
            refuse(_in_short(error))
        return matcher

    def check(self, grammar: Grammar) -> None:
        """Raises `BadRequest` for what takes too long to compile, or fails a few tokens later."""
        self.prepare()  # that time is not the grammar's
        started = time.thread_time()
        matcher = self.compile(grammar)
        try:
            for _ in range(NUM_TRIAL_TOKENS):
                mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
                allowed = allowed[~np.isin(allowed, self.end_ids)]
                if matcher.is_error() or not allowed.size:
                    break
                matcher.consume_tokens([int(allowed[allowed.size // 2])])
            error = matcher.get_error()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as failure:  # a panic of the library is no Exception
            error = str(failure) or type(failure).__name__
        if error:
            refuse(_in_short(error))
        if time.thread_time() - started > MAX_CHECK_SECONDS:
            refuse(f"it takes more than {MAX_CHECK_SECONDS:g} s to compile; make it simpler")

    def spell(self, text: bytes) -> list[int]:
        """Tokens of exactly these bytes, none of them a control token."""
        try:
            token_ids = self._encode(text.decode())
            spelt = b"".join(self._token_bytes[i] for i in token_ids)
            if spelt == text and self._controls.isdisjoint(token_ids):
                return token_ids
        except (UnicodeDecodeError, BadRequest):
            pass  # the text is part of a character, or the tokenizer cannot encode it
        return self._spell_greedily(text)

    def _spell_greedily(self, text: bytes) -> list[int]:
        """The longest token at each byte; what no token begins is left out, with all behind it."""
        token_ids: list[int] = []
        start = 0
        while start < len(text):
            for end in range(min(len(text), start + self._max_bytes), start, -1):
                token_id = self._ids.get(text[start:end])
                if token_id is not None:
                    token_ids.append(token_id)
                    start = end
                    break
            else:
                break
        return token_ids


class _TokenizerAdapter:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.tokens = vocabulary._token_bytes
        self.special_token_ids = sorted(vocabulary._controls)
        self.eos_token_id = vocabulary.end_ids[0]
        self._spell = vocabulary.spell

    def __call__(self, text: bytes) -> list[int]:
        return self._spell(text)


def check_grammar(grammar: Grammar, tokenizer: Tokenizer) -> None:
    """Refuse what the engine could not follow. Raises `BadRequest`.

    Takes some milliseconds for most grammars, `MAX_CHECK_SECONDS` at worst; other threads go on
    meanwhile. The first call for a tokenizer that is not prepared takes a second more.
    """
    tokenizer.grammar_vocabulary.check(grammar)


def _in_short(error: str) -> str:
    """The library's complaint without its state and its copy of the grammar."""
    line = one_line(re.split(r"<state>|<backtrace>|\n +1 \| ", error)[0], limit=len(error))
    return line if len(line) <= 200 else f"{line[:80]}…{line[-120:]}"


def refuse(reason: str) -> NoReturn:
    raise BadRequest(
        f"Invalid 'response_format': {reason}",
        param="response_format",
        code="invalid_json_schema",
    )


def _source(grammar: Grammar) -> str:
    """The grammar as the library reads it. Raises `BadRequest` for what it should not see."""
    match grammar.kind:
        case "json_object":
            return _schema_source({"type": "object"})
        case "json_schema":
            return _schema_source(_parse_schema(grammar.text))
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            _check_lark(grammar.text)
            return llguidance.LLMatcher.grammar_from_lark(grammar.text)


def _parse_schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except RecursionError:
        refuse("the schema is nested too deeply")
    except ValueError as error:
        refuse(f"the schema is not JSON: {error}")
    if not isinstance(schema, dict):
        refuse("the schema must be a JSON object")
    return schema


def _schema_source(schema: dict[str, Any]) -> str:
    _check_levels(_schema_levels(schema))
    _check_overlap(schema)
    return llguidance.LLMatcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": WHITESPACE, "lenient": False}
    )


def _schema_levels(schema: dict[str, Any]) -> int:
    """Nesting of a schema and of all the parts it refers to, added up."""
    num_properties = 0
    targets: set[str] = set()
    levels = 0
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        node, level = pending.pop()
        levels = max(levels, level)
        if isinstance(node, dict):
            properties = node.get("properties")
            num_properties += len(properties) if isinstance(properties, dict) else 0
            if isinstance(reference := node.get("$ref"), str):
                targets.add(reference)
            pending += [(part, level + 1) for part in node.values()]
        elif isinstance(node, list):
            pending += [(part, level + 1) for part in node]
    if num_properties > MAX_PROPERTIES:
        refuse(f"the schema may name {MAX_PROPERTIES} properties, it has {num_properties}")
    whole = levels
    for target in targets:
        part = _find(schema, target)
        levels += whole if part is schema or part is None else _depth(part)
    return levels


def _find(schema: Any, reference: str) -> Any:
    """The part a reference means, None if that is not plain."""
    start, *steps = reference.split("/")
    if start != "#":
        return None
    for step in steps:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if not isinstance(schema, dict) or name not in schema:
            return None
        schema = schema[name]
    return schema


def _depth(node: Any) -> int:
    deepest = 0
    pending = [(node, 1)]
    while pending:
        part, level = pending.pop()
        deepest = max(deepest, level)
        if isinstance(part, dict | list):
            parts = part.values() if isinstance(part, dict) else part
            pending += [(one, level + 1) for one in parts]
    return deepest


def _check_lark(text: str) -> None:
    """A rule may refer to any other, so each line counts, with its brackets."""
    levels = 0
    rest = []
    end = 0
    while (found := EMBEDDED_SCHEMA.search(text, end)) is not None:
        rest.append(text[end : found.end()])
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            refuse(f"the grammar embeds what is no JSON schema: {error}")
        levels += _schema_levels(schema)
        _check_overlap(schema)
    rest.append(text[end:])
    for line in "".join(rest).splitlines():
        levels += 1 + min(sum(map(line.count, "([{")), 40)
    _check_levels(levels)
    num_overlaps = LARK_LITERAL.sub("", "".join(rest)).count("&")
    if num_overlaps > MAX_EXPRESSIONS:
        refuse(f"the grammar may use & {MAX_EXPRESSIONS} times, it does {num_overlaps} times")


def _check_overlap(schema: Any) -> None:
    if isinstance(schema, dict) and (reason := why_too_much(schema, _find)) is not None:
        refuse(reason)


def _check_levels(levels: int) -> None:
    if levels > MAX_LEVELS:
        refuse(
            f"its parts may be nested {MAX_LEVELS} levels deep in all, over everything that others "
            f"refer to; these are {levels}"
        )
