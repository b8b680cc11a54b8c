"""The sandbox that chat templates run in: Jinja as transformers sets it up, keeping the trace, with limits."""

import datetime
import json
import re
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sftcli.text.traced import Traced, concat, trace

MAX_OUTPUT = 16 << 20  # characters that a template may write


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers has it; the block itself changes no text."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Writes `~` as a call of ours: Jinja's own joins plain text and would lose the trace."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concat(map(str, (")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")))")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Repetition and formatting of text can ask for gigabytes: numbers only."""
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            if (operator == "*" and max(_size(left), 1) * max(_size(right), 1) > MAX_OUTPUT) or operator == "**":
                raise jinja2.sandbox.SecurityError("repetition is too long")
            if operator == "%" and re.search(r"\d{4,}|\*", str(left)):
                raise jinja2.sandbox.SecurityError("format width is too large")
        elif operator == "**" and abs(right) > 64:
            raise jinja2.sandbox.SecurityError("exponent is too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str.__str__(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As transformers: plain JSON without HTML escapes. What it writes came from data, so it is traced."""
    message = _traced_message(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
    return text if message is None else trace(text, message)


def _traced_message(value: Any) -> int | None:
    if isinstance(value, Traced):
        return value.spans[0][2] if value.spans else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((message for item in items if (message := _traced_message(item)) is not None), None)


def _join(value: Any, separator: str = "", attribute: str | None = None) -> str:
    """The `join` filter, keeping the trace."""
    items = [item[attribute] if attribute else item for item in value]
    pieces = [piece for item in items for piece in (separator, item if isinstance(item, str) else str(item))]
    return concat(pieces[1:])


def environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False
    )
    environment.filters |= {"tojson": _tojson, "join": _join}
    now = datetime.datetime.now()  # one moment for all: a prompt and its training text are rendered apart
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
    return environment
