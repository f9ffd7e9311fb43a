"""Finds the function calls in a model's text, as it comes, in every format DeepSeek's models write.

    V3, R1  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
            ```json
            {...}
            ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    V3.1    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...
    V3.2    <｜DSML｜function_calls> with <｜DSML｜invoke name="NAME"> for each call, and in it a
            <｜DSML｜parameter name="KEY" string="true|false"> for each argument
    Hermes  <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>

All of them are recognised whatever the model: some write a sibling's. A call is told as soon as its
name is known and its arguments have begun; from then on its arguments are passed on as they come.
Until then it is held back, and if it turns out to be no call it is text, all of it. A call that
breaks later ends with what came. White space around calls is no text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"
DSML = "｜DSML｜"
HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
DSML_BLOCKS = ("function_calls", "tool_calls")  # V3.2's word and V4's
OPENERS = (
    CALLS_BEGIN,
    CALL_BEGIN,
    HERMES_BEGIN,
    *(f"<{DSML}{block}>" for block in DSML_BLOCKS),
)
"""What a run of calls begins with. Each has one ``<``, in front."""

MARKERS = frozenset({CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP, DSML, HERMES_BEGIN})
MARKERS |= {HERMES_END}
"""Tokens that a vocabulary may have for the formats, which otherwise are no text."""

MAX_HEADER_CHARS = 512  # before the arguments; what goes on longer is no call
MAX_SPACE_CHARS = 64  # before a call that are no text

_NAME = r"[\w.:/-]{1,128}"
_OPENER = re.compile("|".join(map(re.escape, OPENERS)))
_FENCED = re.compile(
    rf"\s*(?:[^\s<>]{{0,64}}{SEP}\s*(?P<fenced>{_NAME})\s*(?:```(?:json)?)?\s*"
    rf"|(?P<bare>{_NAME})\s*{SEP}\s*)"
)
_HERMES = re.compile(
    rf'\s*\{{\s*"name"\s*:\s*"(?P<name>{_NAME})"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_INVOKE_TAG, _INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke>"
_INVOKE = re.compile(rf'\s*{_INVOKE_TAG}\s+name="({_NAME})"\s*>')
_PARAMETER_TAG, _PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter>"
_PARAMETER = re.compile(
    rf'{_PARAMETER_TAG}\s+name="([^"<>\n]{{0,256}})"(?:\s+string="(true|false)")?\s*>'
)
_IN_STRING, _IN_JSON = re.compile(r'["\\]'), re.compile(r'["{}\[\]<]')


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A part of a call: its id and name once, in front, then pieces of its arguments' JSON."""

    index: int  # of the call in the answer, from 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A run of text, or a part of a call. ``end`` counts the characters read up to its end."""

    end: int
    text: str = ""
    call: ToolDelta | None = None


class ToolCallParser:
    """Splits text into content and calls. How the text is cut makes no difference.

    With ``max_calls`` the text is complete behind that many calls; what follows is dropped.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self.num_calls = 0
        self.num_chars = 0  # fed so far
        self.is_full = False
        self._buffer = ""  # not decided upon yet
        self._parsed: list[Parsed] = []
        self._step: Callable[[], bool] = self._outside
        self._trims = False  # white space at the start of the buffer stands behind a call
        self._lead = 0  # characters of the buffer up to where a call's header begins
        self._closing: Callable[[], bool] = self._outside  # what follows the call in progress
        self._depth = 0  # open brackets of the arguments
        self._in_string = self._escaped = False
        self._num_parameters = 0
        self._num_scanned = 0

    def feed(self, text: str) -> list[Parsed]:
        """What this makes certain."""
        self._buffer += text
        self.num_chars += len(text)
        while self._step():
            pass
        parsed, self._parsed = self._parsed, []
        return parsed

    def finish(self) -> list[Parsed]:
        """The rest of the text; what is fed next begins a new one."""
        while self._step in (self._block, self._fenced, self._hermes, self._invoke):
            self._no_call()
            while self._step():
                pass
        if self._step == self._outside:
            self._say(len(self._buffer))
        elif self._step == self._string_value:
            self._argue(_escaped(self._buffer), len(self._buffer))
        elif self._step == self._json_value:
            self._argue(self._buffer, len(self._buffer))
        self._buffer = ""  # else it is half a mark of the format
        if not self.is_full:
            self._step, self._trims = self._outside, False
        parsed, self._parsed = self._parsed, []
        return parsed

    # -- what is decided -------------------------------------------------------------------------

    @property
    def _position(self) -> int:
        return self.num_chars - len(self._buffer)

    def _skip(self, num_chars: int) -> str:
        skipped, self._buffer = self._buffer[:num_chars], self._buffer[num_chars:]
        return skipped

    def _skip_space(self) -> str:
        self._skip(len(self._buffer) - len(self._buffer.lstrip()))
        return self._buffer

    def _say(self, num_chars: int) -> None:
        if text := self._skip(num_chars):
            self._parsed.append(Parsed(self._position, text))

    def _begin(self, name: str, num_chars: int, closing: Callable[[], bool]) -> None:
        self._skip(num_chars)
        self._depth, self._in_string, self._escaped = 0, False, False
        self._closing = closing
        delta = ToolDelta(self.num_calls, f"call_{secrets.token_hex(12)}", name)
        self._parsed.append(Parsed(self._position, call=delta))
        self.num_calls += 1

    def _argue(self, text: str, num_chars: int) -> None:
        self._skip(num_chars)
        if text:
            delta = ToolDelta(self.num_calls - 1, arguments=text)
            self._parsed.append(Parsed(self._position, call=delta))

    def _end(self) -> bool:
        self.is_full = self.num_calls == self._max_calls
        self._step = self._drop if self.is_full else self._closing
        return True

    def _drop(self) -> bool:
        self._buffer = ""
        return False

    def _no_call(self) -> bool:
        """The opener is text; behind it there may be another one."""
        self._say(self._lead)
        self._step, self._trims = self._outside, False
        return True

    def _leave(self, *, trims: bool) -> bool:
        self._step, self._trims = self._outside, trims
        return True

    # -- text ------------------------------------------------------------------------------------

    def _outside(self) -> bool:
        if self._trims:
            self._trims = not self._skip_space()
        match = _OPENER.search(self._buffer)
        if match is None:
            tag = max(self._buffer.rfind("<"), 0)
            tail = self._buffer[tag:]
            may_open = any(opener.startswith(tail) for opener in OPENERS)
            self._say(self._before_space(tag if may_open else len(self._buffer)))
            return False
        start = self._before_space(match.start())
        self._say(start)
        self._lead = match.end() - start
        if match.group() == CALLS_BEGIN:
            self._step = self._block
        elif match.group() == CALL_BEGIN:
            self._step = self._fenced
        elif match.group() == HERMES_BEGIN:
            self._step = self._hermes
        else:
            self._step = self._invoke
        return True

    def _before_space(self, end: int) -> int:
        floor = max(end - MAX_SPACE_CHARS, 0)
        return floor + len(self._buffer[floor:end].rstrip())

    # -- headers ---------------------------------------------------------------------------------

    def _block(self) -> bool:
        rest = self._buffer[self._lead :].lstrip()
        num_spaces = len(self._buffer) - self._lead - len(rest)
        if num_spaces <= MAX_SPACE_CHARS:
            if rest.startswith(CALL_BEGIN):
                self._lead += num_spaces + len(CALL_BEGIN)
                self._step = self._fenced
                return True
            if CALL_BEGIN.startswith(rest):
                return False
        return self._no_call()

    def _fenced(self) -> bool:
        return self._header(_FENCED, CALL_END, 1, self._between_fenced)

    def _hermes(self) -> bool:
        return self._header(_HERMES, HERMES_END, 2, self._after_hermes)

    def _header(
        self, header: re.Pattern[str], end: str, nth: int, closing: Callable[[], bool]
    ) -> bool:
        """Arguments begin at the ``nth`` brace, which must come soon and before ``end``."""
        rest = self._buffer[self._lead :]
        brace = -1
        for _ in range(nth):
            brace = rest.find("{", brace + 1)
            if brace < 0:
                return (end in rest or len(rest) > MAX_HEADER_CHARS) and self._no_call()
        match = header.fullmatch(rest[:brace]) if brace <= MAX_HEADER_CHARS else None
        if match is None:
            return self._no_call()
        self._begin(next(filter(None, match.groups())), self._lead + brace, closing)
        self._step = self._json
        return True

    def _invoke(self) -> bool:
        rest = self._buffer[self._lead :]
        end = rest.find(">")
        if end < 0:
            tag = rest.lstrip()
            is_tag = tag.startswith(_INVOKE_TAG) or _INVOKE_TAG.startswith(tag)
            return (not is_tag or len(rest) > MAX_HEADER_CHARS) and self._no_call()
        match = _INVOKE.fullmatch(rest[: end + 1]) if end <= MAX_HEADER_CHARS else None
        if match is None:
            return self._no_call()
        self._begin(match[1], self._lead + end + 1, self._between_invokes)
        self._num_parameters = 0
        self._step = self._parameters
        return True

    # -- arguments -------------------------------------------------------------------------------

    def _json(self) -> bool:
        """Up to the bracket that closes the first one. Marks inside strings are text."""
        buffer, i = self._buffer, 0
        while i < len(buffer):
            if self._escaped:
                self._escaped = False
                i += 1
                continue
            match = (_IN_STRING if self._in_string else _IN_JSON).search(buffer, i)
            if match is None:
                break
            char, i = match.group(), match.end()
            if char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = not self._in_string
            elif char in "{[":
                self._depth += 1
            elif char == "<":  # never JSON
                self._argue(buffer[: i - 1], i - 1)
                return self._end()
            else:
                self._depth -= 1
                if self._depth == 0:
                    self._argue(buffer[:i], i)
                    return self._end()
        self._argue(buffer, len(buffer))
        return False

    def _parameters(self) -> bool:
        rest = self._skip_space()
        if rest.startswith(_INVOKE_END):
            self._argue("}" if self._num_parameters else "{}", len(_INVOKE_END))
            return self._end()
        end = rest.find(">")
        if end < 0 and len(rest) <= MAX_HEADER_CHARS:
            is_tag = rest.startswith(_PARAMETER_TAG)
            if is_tag or _PARAMETER_TAG.startswith(rest) or _INVOKE_END.startswith(rest):
                return False
        match = _PARAMETER.fullmatch(rest[: end + 1]) if 0 <= end <= MAX_HEADER_CHARS else None
        if match is None:
            return self._end()
        is_string = match[2] == "true"
        opening = ", " if self._num_parameters else "{"
        self._num_parameters += 1
        self._num_scanned = 0
        quote = '"' if is_string else ""
        self._argue(f"{opening}{_dumps(match[1])}: {quote}", end + 1)
        self._step = self._string_value if is_string else self._json_value
        return True

    def _string_value(self) -> bool:
        end = self._buffer.find(_PARAMETER_END)
        if end >= 0:
            self._argue(_escaped(self._buffer[:end]) + '"', end + len(_PARAMETER_END))
            self._step = self._parameters
            return True
        tag = max(self._buffer.rfind("<"), 0)
        may_end = _PARAMETER_END.startswith(self._buffer[tag:])
        num_chars = tag if may_end else len(self._buffer)
        self._argue(_escaped(self._buffer[:num_chars]), num_chars)
        return False

    def _json_value(self) -> bool:
        """Held until it is whole: only then is it known to be JSON, and else it is a text."""
        end = self._buffer.find(_PARAMETER_END, self._num_scanned)
        if end < 0:
            self._num_scanned = max(len(self._buffer) - len(_PARAMETER_END) + 1, 0)
            return False
        value = self._buffer[:end]
        self._argue(value if _is_json(value) else _dumps(value), end + len(_PARAMETER_END))
        self._step = self._parameters
        return True

    # -- behind a call ---------------------------------------------------------------------------

    def _between_fenced(self) -> bool:
        rest = self._skip_space()
        if rest.startswith(CALL_BEGIN):
            self._lead, self._step = len(CALL_BEGIN), self._fenced
            return True
        return self._close(rest, (CALL_END, "```"), (CALLS_END,), (CALL_BEGIN,))

    def _after_hermes(self) -> bool:
        return self._close(self._skip_space(), ("}",), (HERMES_END,))

    def _between_invokes(self) -> bool:
        rest = self._skip_space()
        if rest.startswith(_INVOKE_TAG):
            self._lead, self._step = 0, self._invoke
            return True
        ends = tuple(f"</{DSML}{block}>" for block in DSML_BLOCKS)
        return self._close(rest, (_INVOKE_END,), ends, (_INVOKE_TAG,))

    def _close(
        self, rest: str, inner: tuple[str, ...], outer: tuple[str, ...], next_: tuple[str, ...] = ()
    ) -> bool:
        """Skip a closing mark; behind an ``outer`` one, or anything else, there is text again."""
        for mark in inner + outer:
            if rest.startswith(mark):
                self._skip(len(mark))
                return mark in inner or self._leave(trims=True)
        if any(mark.startswith(rest) for mark in inner + outer + next_):
            return False
        return self._leave(trims=False)


def _dumps(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _dumps(text)[1:-1]


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
