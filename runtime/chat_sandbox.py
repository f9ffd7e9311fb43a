"""The jinja environment of chat templates, which are programs from strangers.

jinja's immutable sandbox keeps them from Python. This keeps them from running for ever and from
building something huge: a rendering has a budget of work, charged for every block, filter, operator
and method; and what would make much of little is refused before it is made.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 8_000_000  # of one text
MAX_ITEMS = 1_000_000  # of one list, or of all that is printed of a nested one
MAX_INTEGER_BITS = 4096
MAX_WORK = 1_000_000_000  # of one rendering; a character costs 1
BLOCK_WORK = 1000  # entering a block: a second or so for all of them
ITEM_WORK = 200
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda item, container: item in container,
    "notin": lambda item, container: item not in container,
}
"""By jinja's names."""
PRINTING_FILTERS = frozenset({"join", "pprint", "string", "tojson", "urlencode", "xmlattr"})

_work_left: ContextVar[int] = ContextVar("work_left", default=MAX_WORK)


@contextmanager
def budget() -> Iterator[None]:
    """One rendering, which may take `MAX_WORK`."""
    token = _work_left.set(MAX_WORK)
    try:
        yield
    finally:
        _work_left.reset(token)


def charge(work: int) -> None:
    """Take from the budget. Raises `jinja2.TemplateError` when it is used up."""
    left = _work_left.get() - work
    if left < 0:
        raise jinja2.TemplateError("the template takes too long")
    _work_left.set(left)


class _CountedCode(CodeGenerator):
    """Charges for each block entered: bodies of loops, macros and conditions."""

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        self.writeline("environment.enter_block()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja's
        """``~`` as a call that is charged for."""
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: jinja2.nodes.Compare, frame: Frame) -> None:  # noqa: N802
        """Comparisons too: lists are walked through."""
        self.write("environment.compare(")
        self.visit(node.expr, frame)
        self.write(", (")
        for operand in node.ops:
            self.write(f"({operand.op!r}, ")
            self.visit(operand.expr, frame)
            self.write("), ")
        self.write("))")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks an assistant's text for training; a prompt is the text inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja asks for a set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """With the names that transformers gives a template."""

    code_generator_class = _CountedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
            finalize=_printable,
            optimized=False,  # nothing is evaluated before there is a budget
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _charged(name, apply) for name, apply in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form[:100]),
            "range": _bounded_range,
        }

    def enter_block(self) -> None:
        charge(BLOCK_WORK)

    def concat(self, parts: Sequence[Any]) -> str:  # type: ignore[override]
        _require_chars(sum(_printed_size(part) for part in parts))
        return "".join(map(str, parts))

    def compare(self, left: Any, others: Sequence[tuple[str, Any]]) -> Any:
        """``left < a < b`` and the like."""
        result: Any = True
        for name, right in others:
            if not isinstance(left, str) and not isinstance(right, str):
                _printed_size((left, right))
            charge(_num_items(right))
            result = COMPARISONS[name](left, right)
            if not result:
                break
            left = right
        return result

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_text(name, owner, [*args, *kwargs.values()])
        charge(_num_items(owner) + BLOCK_WORK)
        return _sized(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateError("** is not available in a chat template")
        if operator == "%" and isinstance(left, str):
            _require_narrow(left)
        numbers = [value for value in (left, right) if isinstance(value, int)]
        sizes = [_num_items(value) for value in (left, right)]
        if operator == "*" and len(numbers) == 2:
            if sum(number.bit_length() for number in numbers) > MAX_INTEGER_BITS:
                raise jinja2.TemplateError("a number of more than a thousand digits")
        elif operator == "*":
            _require_chars(max(sizes) * max(map(abs, numbers), default=1))
        _require_chars(sum(sizes))
        return _sized(super().call_binop(context, operator, left, right))


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _require_chars(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise jinja2.TemplateError(f"builds more than {MAX_CHARS} characters or items")
    charge(num_chars)


def _sized(value: Any) -> Any:
    """The value, charged for."""
    is_text = isinstance(value, str)
    size = _num_items(value)
    if size > (MAX_CHARS if is_text else MAX_ITEMS):
        raise jinja2.TemplateError(f"builds more than {MAX_CHARS if is_text else MAX_ITEMS} items")
    charge(size if is_text else size * ITEM_WORK)
    return value


def _printed_size(value: Any) -> int:
    """About how many characters a value is as text; lists may hold themselves many times over."""
    num_chars, num_values, rest = 0, 0, [value]
    while rest:
        part = rest.pop()
        num_values += 1
        if num_values > MAX_ITEMS or num_chars > MAX_CHARS:
            raise jinja2.TemplateError(f"prints more than {MAX_ITEMS} values")
        if isinstance(part, str):
            num_chars += len(part)
        elif isinstance(part, Mapping):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            rest += part
    charge(num_values * ITEM_WORK)
    return num_chars


def _printable(value: Any) -> Any:
    """What is printed, if it is not too much."""
    if not isinstance(value, str):
        _printed_size(value)
    return value


def _check_text(method: str, text: str, arguments: list[Any]) -> None:
    """Refuses what makes a huge text of a small one."""
    match method:
        case "format" | "format_map":
            _require_narrow(text)
        case "center" | "expandtabs" | "ljust" | "rjust" | "zfill":
            _require_small(text, arguments)
        case "replace":
            _require_replaced(text, arguments)
        case "join":
            _require_joined(text, arguments)
        case "translate":
            raise jinja2.TemplateError("translate is not available in a chat template")


def _require_narrow(form: str) -> None:
    """Refuses to format what is padded to something huge."""
    if re.search(r"\d{7}|%[-+ #0]*\*|\{[^{}]*\{", form):
        raise jinja2.TemplateError("a format that pads to millions of characters")


def _require_small(value: Any, arguments: Sequence[Any]) -> None:
    """Refuses to pad ``value``, or each of its lines or items, to something huge."""
    widths = [abs(n) for n in arguments if isinstance(n, int)]
    _require_chars(max(widths, default=0) * max(_num_items(value), 1))


def _require_replaced(text: str, arguments: Sequence[Any]) -> None:
    old, new = (len(str(value)) for value in (*arguments[:2], "", "")[:2])
    _require_chars(len(text) + (len(text) // max(old, 1) + 1) * new)


def _require_joined(separator: str, arguments: Sequence[Any]) -> None:
    for parts in arguments:
        if isinstance(parts, list | tuple):
            _require_chars(_printed_size(parts) + len(parts) * len(separator))


def _charged(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, charged for and kept from building something huge."""

    @functools.wraps(apply)
    def charged(*args: Any, **kwargs: Any) -> Any:
        passed = args[1:] if hasattr(apply, "jinja_pass_arg") else args
        value, options = passed[0], [*passed[1:], *kwargs.values()]
        charge(_num_items(value) + BLOCK_WORK)
        if name in PRINTING_FILTERS:
            _require_chars(_printed_size(value))
        if name == "format":
            _require_narrow(str(value))
        elif name in ("batch", "center", "indent", "slice"):
            _require_small(value, options)
        elif name == "replace":
            _require_replaced(str(value), options)
        elif name == "join":
            _require_joined(next((text for text in options if isinstance(text, str)), ""), [value])
        return _sized(apply(*args, **kwargs))

    return charged


def _bounded_range(*bounds: int) -> range:
    steps = range(*bounds)
    if len(steps) > MAX_ITEMS:
        raise jinja2.TemplateError(f"a range of more than {MAX_ITEMS} steps")
    charge(len(steps) * ITEM_WORK)
    return steps


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter: no HTML escapes, non-ASCII text as it is."""
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    # the mark that parts control tokens must stay what it is (`runtime.tokenizer`)
    return text.replace(r"\ue000", "\ue000") if ensure_ascii else text
