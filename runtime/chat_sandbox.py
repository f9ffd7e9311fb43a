"""The jinja environment of chat templates, which are programs from strangers.

jinja's immutable sandbox keeps them from Python. Beyond that a rendering has a budget of work, from
which every block, filter, test, operator and method takes, and what would make much of little is
refused before it is made. Ordinary templates render as in transformers.
"""

from __future__ import annotations

import functools
import json
import re
import string
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
WALKED_WORK = 20  # for each item that a filter, a test or `in` looks at
COPIED_CHARS = 16  # that are copied for one unit of work
MAX_INDENT = 16
MAX_DIGITS = 1000  # of a text read as a number
REMOVED_FILTERS = ("urlize", "wordwrap", "xmlattr")  # of HTML pages
READING_FILTERS = frozenset(
    {"groupby", "join", "max", "min", "pprint", "sort", "string", "tojson", "unique", "urlencode"}
)
"""Those that look into what a list holds."""

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

    def _output_child_to_const(
        self, node: jinja2.nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo
    ) -> str:
        """Nothing but plain text is evaluated while the template is compiled."""
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_List(self, node: jinja2.nodes.List, frame: Frame) -> None:  # noqa: N802 - jinja's name
        self._charged("built", super().visit_List, node, frame)

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._charged("built", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._charged("built", super().visit_Dict, node, frame)

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, jinja2.nodes.Slice):
            self._charged("sliced", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Operand(self, node: jinja2.nodes.Operand, frame: Frame) -> None:  # noqa: N802
        if node.op in ("in", "notin"):
            self.write(" in " if node.op == "in" else " not in ")
            self._charged("searched", self.visit, node.expr, frame)
        else:
            super().visit_Operand(node, frame)

    def _charged(
        self, method: str, visit: Callable[[Any, Frame], None], node: Any, frame: Frame
    ) -> None:
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """``~`` as a call that is charged for."""
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks an assistant's text for training; a prompt is the text inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja asks for a set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """With the names that transformers gives a template."""

    code_generator_class = _CountedCode
    intercepted_binops = frozenset({"+", "-", "*", "**", "/", "//", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
            finalize=_printable,
            optimized=False,  # nothing is evaluated before there is a budget
        )
        self.filters["tojson"] = _to_json
        self.filters = {
            name: _charged_filter(name, apply)
            for name, apply in self.filters.items()
            if name not in REMOVED_FILTERS
        }
        tests: Any = self.tests  # jinja's annotation is too narrow to call them
        self.tests = {name: _charged_test(test) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form[:100]),
            "range": _bounded_range,
        }

    def enter_block(self) -> None:
        charge(BLOCK_WORK)

    def built(self, value: Any) -> Any:
        """A list, tuple or dict as written; those it holds may hold others many times over."""
        _printed_size(value)
        return value

    def searched(self, value: Any) -> Any:
        """What stands behind ``in``."""
        charge(_walk_work(value))
        return value

    def sliced(self, value: Any) -> Any:
        return _sized(value)

    def concatenated(self, parts: Sequence[Any]) -> str:
        _require_chars(sum(_printed_size(part) for part in parts))
        return "".join(map(str, parts))

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_text(name, owner, [*args, *kwargs.values()])
        elif name == "to_bytes":
            raise jinja2.TemplateError("bytes are not available in a chat template")
        charge(_num_items(owner) + BLOCK_WORK)
        result = _sized(super().call(context, called, *args, **kwargs))
        return self.built(result) if isinstance(result, dict) else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _require_narrow_percent(left)
        numbers = [value for value in (left, right) if isinstance(value, int)]
        sizes = [_num_items(value) for value in (left, right)]
        if len(numbers) == 2:
            bits = [number.bit_length() for number in numbers]
            power = bits[0] * abs(numbers[1]) if operator == "**" else 0
            if max(sum(bits), power) > MAX_INTEGER_BITS:
                raise jinja2.TemplateError("a number of more than a thousand digits")
        elif operator == "*":
            _require_chars(max(sizes) * max(map(abs, numbers), default=1))
        _require_chars(sum(sizes))
        return _sized(super().call_binop(context, operator, left, right))


def _num_items(value: Any) -> int:
    """Items of a container, characters of a text, else 0."""
    if isinstance(value, str):
        return len(value)
    is_container = isinstance(value, list | tuple | dict | range | set | frozenset | bytes)
    return len(value) if is_container else 0


def _walk_work(value: Any) -> int:
    """Of looking at all of a value once."""
    num_items = _num_items(value)
    return num_items // COPIED_CHARS if isinstance(value, str) else num_items * WALKED_WORK


def _require_chars(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise jinja2.TemplateError(f"builds more than {MAX_CHARS} characters or items")
    charge(num_chars // COPIED_CHARS)


def _sized(value: Any) -> Any:
    """The value, charged for."""
    is_text = isinstance(value, str)
    size = _num_items(value)
    if size > (MAX_CHARS if is_text else MAX_ITEMS):
        raise jinja2.TemplateError(f"builds more than {MAX_CHARS if is_text else MAX_ITEMS} items")
    charge(size // COPIED_CHARS if is_text else size * ITEM_WORK)
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
            _require_narrow_braces(text)
        case "center" | "expandtabs" | "ljust" | "rjust" | "zfill":
            _require_small(text, arguments)
        case "replace":
            _require_replaced(text, arguments)
        case "join":
            _require_joined(text, arguments)
        case "rfind" | "rindex" | "rpartition" | "rsplit":  # Python's search backwards is quadratic
            longest = max((len(str(part)) for part in arguments), default=1)
            charge(len(text) * longest // COPIED_CHARS)
        case "encode" | "translate":
            raise jinja2.TemplateError(f"{method} is not available in a chat template")


def _require_narrow_percent(form: str) -> None:
    """Refuses a width or precision of five digits or from an argument."""
    if re.search(r"%(\([^)]*\))?[-+ #0]*(\d*\.)?(\*|\d{5})", form):
        raise jinja2.TemplateError("a format that pads to thousands of characters")


def _require_narrow_braces(form: str) -> None:
    """The same of ``str.format``."""
    specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(form)]
    if any(re.search(r"\{|\d{5}", spec) for spec in specs):
        raise jinja2.TemplateError("a format that pads to thousands of characters")


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


def _charged_test(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def charged(*args: Any, **kwargs: Any) -> Any:
        charge(sum(map(_walk_work, args)))
        return test(*args, **kwargs)

    return charged


def _charged_filter(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, charged for and kept from building something huge."""

    @functools.wraps(apply)
    def charged(*args: Any, **kwargs: Any) -> Any:
        passed = args[1:] if hasattr(apply, "jinja_pass_arg") else args
        value, options = passed[0], [*passed[1:], *kwargs.values()]
        charge(BLOCK_WORK + _walk_work(value))
        if name in READING_FILTERS:
            _require_chars(_printed_size(value))
        if name == "format":
            _require_narrow_percent(str(value))
        elif name == "tojson":
            _require_plain_json(kwargs)
        elif name == "int" and isinstance(value, str) and len(value) > MAX_DIGITS:
            raise jinja2.TemplateError(f"a number of more than {MAX_DIGITS} digits")
        elif name == "indent" and not isinstance(value, str):
            raise jinja2.TemplateError("indent takes a text")
        elif name in ("batch", "center", "indent", "slice"):
            _require_small(value, options)
        elif name == "replace":
            _require_replaced(str(value), options)
        elif name == "join":
            _require_joined(next((text for text in options if isinstance(text, str)), ""), [value])
        return _sized(apply(*args, **kwargs))

    return charged


def _require_plain_json(options: Mapping[str, Any]) -> None:
    indent = options.get("indent")
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise jinja2.TemplateError(f"tojson indents by at most {MAX_INDENT}")
    if any(len(part) > MAX_INDENT for part in options.get("separators") or ()):
        raise jinja2.TemplateError("a long separator for tojson")


def _bounded_range(*bounds: int) -> range:
    steps = range(*bounds)
    if len(steps) > MAX_ITEMS:
        raise jinja2.TemplateError(f"a range of more than {MAX_ITEMS} steps")
    charge(len(steps) * ITEM_WORK)
    return steps


def _raise_exception(message: Any) -> None:
    _require_chars(_printed_size(message))
    raise jinja2.TemplateError(str(message))


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
