"""The sandbox that chat templates run in: Jinja as transformers sets it up, keeping the trace, with limits."""

import datetime
import functools
import json
import math
import re
from collections.abc import Callable, Sized
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sftcli.text.traced import MAX_TEXT, Traced, concat, formatted, refuse_longer, trace, traced_message

MAX_WIDTH = 10_000  # of a padded text, and other numbers that make a text or list longer
MAX_ITEMS = 1 << 20  # of a list that a template makes by repetition
MAX_BITS = 1 << 14  # of a whole number
WIDE = re.compile(r"%(\(.*\))?[^a-zA-Z%]*(\d{4,}|\*)|\{[^{}]*:[^{}]*\d{4,}", re.DOTALL)  # in a format: a large width
NESTED = re.compile(r"\{[^{}]*\{")  # in a format: a width that is a value
# filters that make a new text of a text, which then counts as content as a whole
SIZED = ("batch", "center", "indent", "round", "slice", "wordwrap")  # filters that take a width or a count
REMADE = ("center", "e", "escape", "forceescape", "indent", "reverse", "title", "truncate", "urlencode", "wordwrap")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers has it; the block itself changes no text."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Writes `~` and what is written out as calls of ours: Jinja's own make plain text and would lose the trace."""

    def _output_child_pre(self, node: jinja2.nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any) -> None:
        self.write("environment.text(")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concat(map(environment.text, (")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")))")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    written = 0  # characters since the template began

    def text(self, value: Any) -> str:
        """What is written for a value: Python's text of a list or an object holds the texts in it, so it is traced."""
        written = _plain(value)
        self.written += len(written)
        if self.written > MAX_TEXT:  # what macros and blocks write is joined at their end only
            raise jinja2.sandbox.SecurityError(f"it writes more than {MAX_TEXT} characters")
        return written

    def call(self, context: Any, called: Any, /, *args: Any, **named: Any) -> Any:
        """Methods of a plain text that put other texts into it keep the trace of those; none may ask for gigabytes."""
        method = getattr(called, "__wrapped__", called)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in ("translate", "format_map"):
                raise jinja2.sandbox.SecurityError(f"str.{name} is not available")
            if name == "format":
                _refuse_format(owner, NESTED)
                _refuse_large((args, named))
            elif name not in ("split", "rsplit", "startswith", "endswith", "find", "index"):
                _refuse_wide(*args, *named.values())
        if type(owner) is str and name in ("join", "replace"):
            called = getattr(Traced(owner, ()), name)
        return super().call(context, called, *args, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Repetition, addition and formatting can ask for gigabytes."""
        texts = isinstance(left, str) or isinstance(right, str)
        if texts or isinstance(left, list | tuple) or isinstance(right, list | tuple):
            limit = MAX_TEXT if texts else MAX_ITEMS
            if (operator == "*" and max(_size(left), 1) * max(_size(right), 1) > limit) or operator == "**":
                raise jinja2.sandbox.SecurityError("repetition is too long")
            if operator == "+" and _size(left) + _size(right) > limit:
                raise jinja2.sandbox.SecurityError("a text or list is too long")
            if operator == "%" and isinstance(left, str):
                _refuse_format(left)
                _refuse_large(right)
                return formatted(left, right)
        elif (operator == "**" and abs(right) > 64) or max(_bits(left), _bits(right)) > MAX_BITS:
            raise jinja2.sandbox.SecurityError("a number is too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _refuse_wide(*given: Any) -> None:
    """Raise for a width or a count that would make a text of gigabytes."""
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in given):
        raise jinja2.sandbox.SecurityError(f"a width or count is larger than {MAX_WIDTH}")


def _refuse_format(pattern: str, *others: re.Pattern[str]) -> None:
    if any(found.search(pattern) for found in (WIDE, *others)):
        raise jinja2.sandbox.SecurityError("format width is too large")


def _refuse_large(value: Any) -> None:
    """Raise for a value whose text would be too long: one text may stand in a list many times."""
    size, left = 0, [value]
    while left:
        item = left.pop()
        size += len(item) if isinstance(item, str) else 2
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            left += item
        if size + len(left) > MAX_TEXT:
            raise jinja2.sandbox.SecurityError(f"the text of a value has more than {MAX_TEXT} characters")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str.__str__(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers: plain JSON without HTML escapes. What it writes came from data, so it is traced."""
    _refuse_wide(indent)
    _refuse_large(value)
    message = traced_message(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text if message is None else trace(text, message)


@jinja2.pass_environment
def _format(environment: _Environment, pattern: Any, *args: Any, **named: Any) -> str:
    """The `format` filter, keeping the trace and the limits of `%`."""
    return str(environment.call_binop(None, "%", _plain(pattern), named or args))


def _safe(value: Any) -> Any:
    """The `safe` filter: nothing is escaped here, and Jinja's marked text has no trace."""
    return value if isinstance(value, Traced) else jinja2.filters.do_mark_safe(value)


def _sized(made_by: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses to make a text or list of gigabytes."""

    @functools.wraps(made_by)
    def sized(*args: Any, **named: Any) -> Any:
        _refuse_wide(*args[1:], *named.values())
        given = [value for value in (*args, *named.values()) if isinstance(value, str)]
        if len(given) > 1 and math.prod(len(value) + 1 for value in given) > MAX_TEXT:  # one may be put between all
            raise jinja2.sandbox.SecurityError("a text is too long")
        return made_by(*args, **named)

    return sized


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    """The `replace` filter, keeping the trace and the limit."""
    source = _plain(text)
    return (source if isinstance(source, Traced) else Traced(source, ())).replace(
        old, new, -1 if count is None else count
    )


def _remade(made_by: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result counts as content if what it was made of does."""

    @functools.wraps(made_by)  # with Jinja's marks of what is passed first
    def remade(*args: Any, **named: Any) -> Any:
        made = made_by(*args, **named)
        source = next((value for value in args if isinstance(value, Traced)), None)
        return source._whole(str(made)) if source is not None and isinstance(made, str) else made

    return remade


def _join(value: Any, separator: str = "", attribute: str | None = None) -> str:
    """The `join` filter, keeping the trace."""
    if isinstance(value, Sized):
        refuse_longer(len(separator) * (len(value) - 1))
    items = [item[attribute] if attribute else item for item in value]
    pieces = [piece for item in items for piece in (separator, _plain(item))]
    return concat(pieces[1:])


def _plain(value: Any) -> str:
    """The `string` filter: a value as text, traced."""
    if isinstance(value, str):
        return value
    _refuse_large(value)
    message = traced_message(value)
    return str(value) if message is None else trace(str(value), message)


def environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False
    )
    environment.filters |= {"tojson": _tojson, "join": _join, "string": _plain, "safe": _safe, "replace": _replace}
    environment.filters |= {"format": _format} | {name: _remade(environment.filters[name]) for name in REMADE}
    environment.filters |= {name: _sized(environment.filters[name]) for name in SIZED}
    now = datetime.datetime.now()  # one moment for all: a prompt and its training text are rendered apart
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
    return environment
