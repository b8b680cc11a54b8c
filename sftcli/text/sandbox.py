"""The sandbox that chat templates run in: Jinja as transformers sets it up, keeping the trace, with limits."""

import datetime
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sftcli.text.traced import Traced, concat, formatted, trace, traced_message

MAX_OUTPUT = 16 << 20  # characters that a template may write
# filters that make a new text of a text, which then counts as content as a whole
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
    intercepted_binops = frozenset(["*", "**", "%"])

    @staticmethod
    def text(value: Any) -> str:
        """What is written for a value: Python's text of a list or an object holds the texts in it, so it is traced."""
        if isinstance(value, str):
            return value
        message = traced_message(value)
        return str(value) if message is None else str(trace(str(value), message))

    def call(self, context: Any, called: Any, /, *args: Any, **named: Any) -> Any:
        """Methods of a plain text that put other texts into it keep the trace of those."""
        owner = getattr(called, "__self__", None)
        if type(owner) is str and called.__name__ in ("join", "replace"):
            called = getattr(Traced(owner, ()), called.__name__)
        return super().call(context, called, *args, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Repetition and formatting of text can ask for gigabytes: numbers only."""
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            if (operator == "*" and max(_size(left), 1) * max(_size(right), 1) > MAX_OUTPUT) or operator == "**":
                raise jinja2.sandbox.SecurityError("repetition is too long")
            if operator == "%" and re.search(r"\d{4,}|\*", str(left)):
                raise jinja2.sandbox.SecurityError("format width is too large")
            if operator == "%" and isinstance(left, str):
                return formatted(left, right)
        elif operator == "**" and abs(right) > 64:
            raise jinja2.sandbox.SecurityError("exponent is too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str.__str__(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers: plain JSON without HTML escapes. What it writes came from data, so it is traced."""
    message = traced_message(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text if message is None else trace(text, message)


def _format(pattern: Any, *args: Any, **named: Any) -> str:
    """The `format` filter, keeping the trace and the limits of `%`."""
    return str(environment().call_binop(None, "%", _Environment.text(pattern), named or args))


def _safe(value: Any) -> Any:
    """The `safe` filter: nothing is escaped here, and Jinja's marked text has no trace."""
    return value if isinstance(value, Traced) else jinja2.filters.do_mark_safe(value)


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
    items = [item[attribute] if attribute else item for item in value]
    pieces = [piece for item in items for piece in (separator, _Environment.text(item))]
    return concat(pieces[1:])


def environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False
    )
    environment.filters |= {"tojson": _tojson, "join": _join, "string": _Environment.text, "safe": _safe}
    environment.filters |= {"format": _format} | {name: _remade(environment.filters[name]) for name in REMADE}
    now = datetime.datetime.now()  # one moment for all: a prompt and its training text are rendered apart
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
    return environment
