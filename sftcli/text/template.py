"""Chat templates in a sandbox: conversations -> text that knows whose words are where.

The model's words of a turn begin exactly where the text that `sft generate` feeds for it ends (the same conversation
up to that turn, rendered with add_generation_prompt), and end with the end-of-turn token that stops it.
"""

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sftcli.artifacts import fingerprint, read_bytes
from sftcli.errors import DataError, UsageError
from sftcli.text.records import COMPLETION_NAMES, Conversation
from sftcli.text.traced import Traced, concat, join_traced, trace

BUILT_IN = Path(__file__).parent / "templates"
NAMES = (*sorted(path.stem for path in BUILT_IN.glob("*.jinja")), "plain")
PLAIN_TEXT = "<bos>{prompt}<sep>{completion}<eos>"
MAX_OUTPUT = 16 << 20
MAX_LITERALS = 1024  # sequences of roles whose literals are kept
OWN_ROLE = "assistant"
SCAFFOLD = "template"  # the role of text that no message holds: headers, separators

TextSegment = tuple[int, int, str, bool, float]  # characters start..end, role, own, weight


@dataclass
class Rendered:
    """A rendered conversation. Segments cover the text; `content`: the characters that came out of messages;
    `cuts`: where turns of the model begin - the text is encoded apart on both sides, as it will be generated."""

    text: str
    segments: list[TextSegment]
    content: list[tuple[int, int]]
    cuts: list[int]


# ---- the sandbox


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


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False
    )
    environment.filters |= {"tojson": _tojson, "join": _join}
    now = datetime.datetime.now()  # one moment for all: a prompt and its training text are rendered apart
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
    return environment


# ---- a template


class Template:
    """A compiled chat template. `specials` are the names it may use: bos_token, eos_token, ..."""

    def __init__(self, source: str, name: str, specials: Mapping[str, str]):
        self.source, self.name, self.specials = source, name, dict(specials)
        self.hash = fingerprint(source, json.dumps(self.specials, sort_keys=True))
        self.header: dict[str, Any] = _header(source)
        try:
            self.compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"template {name}, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise UsageError(f"template {name} is nested too deeply") from None

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that a text template names, the completion last; empty for others."""
        return tuple(self.header.get("fields", ()))

    def render(self, messages: list[Any], tools: Any, open_turn: bool) -> str:
        """Text of the messages; `open_turn` ends it where the model is to speak. Raises DataError."""
        try:
            text = self.compiled.render(
                messages=messages, tools=tools, add_generation_prompt=open_turn, documents=None, **self.specials
            )
        except jinja2.TemplateError as error:
            raise DataError(f"template {self.name} refused it: {error.message or type(error).__name__}") from None
        except Exception as error:  # a template is a program from elsewhere: any of Python's errors may come out
            raise DataError(f"template {self.name} failed: {type(error).__name__}: {error}") from None
        if len(text) > MAX_OUTPUT:
            raise DataError(f"template {self.name} wrote {len(text)} characters")
        return text


def _header(source: str) -> dict[str, Any]:
    """What a template of ours says of itself in its first comment: its control tokens, or the text it was made from."""
    found = re.match(r"\{#- sft (\{.*\}) -#\}", source)
    try:
        header = json.loads(found[1]) if found else {}
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def load_template(
    name: str | None, text: str | None, columns: Mapping[str, str], specials: Mapping[str, str]
) -> Template:
    """A built-in template by name, a Jinja file, or a text such as `<bos>{question}<sep>{answer}<eos>`."""
    if text is not None or name == "plain":
        return Template(text_template(text or PLAIN_TEXT, columns), "plain", specials)
    if name in NAMES:
        return Template((BUILT_IN / f"{name}.jinja").read_text(encoding="utf-8"), str(name), specials)
    path = Path(str(name))
    if not path.is_file():
        raise UsageError(f"no template {name}", hint=f"built in: {', '.join(NAMES)}; or a Jinja file")
    try:
        return Template(read_bytes(path).decode(), path.name, specials)
    except UnicodeDecodeError:
        raise UsageError(f"template {name} is not UTF-8 text") from None


def text_template(text: str, columns: Mapping[str, str]) -> str:
    """The Jinja form of a text template: one message a field; the last field is the model's own words."""
    pieces = re.split(r"\{(\w+)\}", text)
    literals, given = pieces[0::2], pieces[1::2]
    wanted_names = {column: wanted for wanted, column in columns.items()}
    fields = [wanted_names.get(name, name) for name in given]
    if not fields or fields[-1] not in COMPLETION_NAMES:
        raise UsageError(
            f"template text {text!r} must end with the completion field",
            hint=f"one of {{{'}, {'.join(COMPLETION_NAMES)}}}, or map it: --columns completion=NAME",
        )
    header = json.dumps({"text": text, "fields": fields, "verbatim": True}).replace("#}", "#\\u007d")
    after = json.dumps(literals[-1], ensure_ascii=False)
    return (
        f"{{#- sft {header} -#}}\n"
        f"{{%- set before = {json.dumps(literals[:-1], ensure_ascii=False)} %}}\n"
        "{%- for message in messages %}\n"
        "{%- set place = loop.index0 % before | length %}\n"
        "{%- if (message.role == 'assistant') != (place == before | length - 1) %}\n"
        f"{{{{- raise_exception('a text template of {len(fields) - 1} prompt field(s), then the completion') }}}}\n"
        "{%- endif %}\n"
        "{%- if place < before | length - 1 %}\n"
        "{{- before[place] + message.content }}\n"
        "{{- before[-1] if place == before | length - 2 else '' }}\n"
        "{%- else %}\n"
        f"{{{{- (before[0] if before | length == 1 else '') + message.content + {after} }}}}\n"
        "{%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt and before | length == 1 %}\n"
        "{{- before[0] }}\n"
        "{%- endif %}\n"
    )


def control_tokens(template: Template) -> dict[str, Any]:
    """{"controls": [...], "bos", "eos", "pad"} that a tokenizer for this template needs."""
    if "controls" in template.header:
        return template.header
    text = template.header.get("text")
    literal = re.sub(r"\{\w+\}", " ", text) if text else template.source
    pattern = r"<[^<>\s{}]{1,32}>" if text else r"<\|[^<>|\s]{1,48}\|>|</?[a-z_]{1,32}>"
    found = list(dict.fromkeys(re.findall(pattern, literal)))
    pad = next((token for token in ("<pad>", "<|pad|>", "<|endoftext|>") if token in found), "<pad>")
    bos = next((token for token in ("<bos>", "<s>", "<|begin_of_text|>") if token in found), None)
    ends = [token for token in ("<|im_end|>", "<|eot_id|>", "<eos>", "</s>", "<|end|>") if token in found]
    controls = [pad, *(token for token in ("<bos>", "<eos>", "<sep>") if token in found)]
    controls += [token for token in found if token not in controls]
    return {"controls": controls, "bos": bos, "eos": ends[0] if ends else None, "pad": pad}


# ---- whose words are where


@dataclass
class _Turn:
    """One turn of the model inside its own rendering: `text[:end]` is everything up to its end-of-turn token."""

    message: int
    start: int
    text: str
    end: int


class Speaker:
    """Renders conversations and finds the model's own words. `ends`: matches the tokenizer's special tokens."""

    def __init__(self, template: Template, ends: re.Pattern[str] | None):
        self.template, self.ends = template, ends
        self.literals: dict[tuple[tuple[str, ...], bool], list[str]] = {}

    def documents(self, conversation: Conversation) -> list[Rendered]:
        """The conversation as trained: one text, or one a turn where the template rewrites history."""
        if conversation.shape == "text":
            return [self._plain_text(conversation)]
        own = [i for i, message in enumerate(conversation.messages) if message["role"] == OWN_ROLE]
        whole = self._render(conversation, len(conversation.messages), False)
        last = own[-1] if own and own[-1] == len(conversation.messages) - 1 else None
        turns = [self._turn(conversation, i, whole if i == last else None) for i in own]
        if all(whole.startswith(turn.text[: turn.end]) for turn in turns):
            return [self._described(conversation, whole, len(conversation.messages), turns, turns)]
        return [
            self._described(conversation, turn.text, turn.message + 1, _spoken(turns, turn.text), [turn])
            for turn in turns
        ]

    def prompt(self, conversation: Conversation) -> tuple[Rendered, str | None]:
        """The text to feed, and the last turn of the model if the conversation ends with one (its reference)."""
        messages, reference = conversation.messages, None
        if conversation.shape == "text":
            return Rendered(messages[0]["content"], [], [(0, len(messages[0]["content"]))], []), None
        count = len(messages)
        if messages and messages[-1]["role"] == OWN_ROLE:
            count -= 1
            turn = self._turn(conversation, count, None)
            reference = messages[-1].get("content")
            if not isinstance(reference, str) or messages[-1].get("tool_calls"):
                reference = str.__str__(turn.text[turn.start : turn.end])
                reference = re.sub(f"(?:{self.ends.pattern})+$", "", reference) if self.ends else reference
        text = self._render(conversation, count, True)
        own = [i for i in range(count) if messages[i]["role"] == OWN_ROLE]
        turns = [self._turn(conversation, i, None) for i in own]
        return self._described(conversation, text, count, _spoken(turns, text), []), reference

    def _plain_text(self, conversation: Conversation) -> Rendered:
        """The `text` shape goes past the template: everything is trained, and it ends with the end token."""
        text = conversation.messages[0]["content"]
        whole = text + self.template.specials.get("eos_token", "")
        return Rendered(whole, [(0, len(whole), "text", True, conversation.weights[0])], [(0, len(text))], [])

    def _render(self, conversation: Conversation, count: int, open_turn: bool, traced: bool = True) -> str:
        messages, tools = conversation.messages[:count], conversation.tools
        try:
            if self._writes_as_it_is(messages, tools):
                return self._filled(messages, open_turn)
            if traced:
                messages = [
                    {key: value if key == "role" else trace(value, i) for key, value in message.items()}
                    for i, message in enumerate(messages)
                ]
                tools = trace(tools, -1)
            return self.template.render(messages, tools, open_turn)
        except DataError as error:
            if count > 1:  # name the first message that the template cannot take
                for shorter in range(1, count):
                    try:
                        self.template.render(messages[:shorter], conversation.tools, False)
                    except DataError:
                        count = shorter
                        break
            raise DataError(error.reason, None, conversation.path(max(count - 1, 0))) from None

    def _writes_as_it_is(self, messages: list[dict[str, Any]], tools: Any) -> bool:
        """Whether the template says that it writes such messages verbatim: then it need not run for each of them."""
        return bool(self.template.header.get("verbatim") and not tools) and all(
            len(message) == 2 and isinstance(message.get("content"), str) for message in messages
        )

    def _filled(self, messages: list[dict[str, Any]], open_turn: bool) -> str:
        """Contents put between the literals of this sequence of roles."""
        literals = self._literals(tuple(message["role"] for message in messages), open_turn)
        pieces = [literals[0]]
        for i, message in enumerate(messages):
            pieces += (trace(message["content"], i), literals[i + 1])
        return join_traced(pieces)

    def _literals(self, roles: tuple[str, ...], open_turn: bool) -> list[str]:
        """What the template writes before, between and after the contents of messages with these roles."""
        key = (roles, open_turn)
        if key not in self.literals:
            marks = [f"\0{i}\0" for i in range(len(roles))]
            messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            text = self.template.render(messages, None, open_turn)
            found = []
            for mark in marks:
                literal, _, text = text.partition(mark)
                found.append(literal)
            if len(self.literals) >= MAX_LITERALS:
                self.literals.clear()
            self.literals[key] = [*found, text]
        return self.literals[key]

    def _turn(self, conversation: Conversation, i: int, whole: str | None) -> _Turn:
        """Where the words of message i begin and end, in the conversation rendered up to and including it."""
        prompt = self._render(conversation, i, True, traced=False)
        text = whole if whole is not None else self._render(conversation, i + 1, False)
        if not text.startswith(prompt):
            raise DataError(
                f"template {self.template.name}: what it writes to open the model's turn is not how it writes the turn",
                None,
                conversation.path(i),
                hint="the turn lacks something the template opens with (reasoning, for example), or use --template",
            )
        start = len(prompt)
        said = max(
            (end for _, end, message in getattr(text, "spans", ()) if message == i and end > start), default=start
        )
        return _Turn(i, start, text, self._turn_end(text, max(said, start)))

    def _turn_end(self, text: str, said: int) -> int:
        """After the first special token behind the words; without one, the end of the text."""
        found = self.ends.search(text, said) if self.ends else None
        return found.end() if found else len(text)

    def _described(
        self, conversation: Conversation, text: str, count: int, cuts: list[_Turn], own: list[_Turn]
    ) -> Rendered:
        """Segments of the text of the first `count` messages. `cuts`: turns that stand in it as spoken; `own`: those
        that it trains."""
        spans = list(getattr(text, "spans", ()))
        self._refuse_lost_messages(conversation, text, count, {message for _, _, message in spans})
        pieces = [
            (a, b, conversation.messages[m]["role"] if m >= 0 else SCAFFOLD, conversation.weights[m] if m >= 0 else 1.0)
            for a, b, m in spans
        ]
        mine = [(t.start, t.end, conversation.weights[t.message], t in own) for t in cuts]
        content = [(a, b) for a, b, _ in spans]
        return Rendered(str.__str__(text), _segments(len(text), pieces, mine), content, [turn.start for turn in cuts])

    def _refuse_lost_messages(self, conversation: Conversation, text: str, count: int, shown: set[int]) -> None:
        """A template that leaves a message out trains on half a conversation; one that writes it in a way that is not
        followed lets its control strings through."""
        for i, message in enumerate(conversation.messages[:count]):
            content = message.get("content")
            words = content.strip() if isinstance(content, str) else ""
            if any(name not in text for name in _called(message)):
                reason = "has no place for tool calls"
            elif i in shown or not words:
                continue
            elif words not in text:
                reason = f"has no place for role {message['role']!r}"
            elif self.ends and self.ends.search(words):
                reason = "hides which words are the message's, and it has control tokens in them"
            else:
                continue
            raise DataError(f"template {self.template.name} {reason}", None, conversation.path(i))


def _called(message: Mapping[str, Any]) -> list[str]:
    """Names of the functions that a message calls."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [function["name"] for function in functions if isinstance(function.get("name"), str)]


def _spoken(turns: list[_Turn], text: str) -> list[_Turn]:
    """The turns that stand in a text as they were spoken."""
    return [turn for turn in turns if text.startswith(turn.text[: turn.end])]


def _segments(
    length: int, pieces: list[tuple[int, int, str, float]], mine: list[tuple[int, int, float, bool]]
) -> list[TextSegment]:
    """Cover 0..length: the model's turns first, then message content, the rest is scaffold."""
    found: list[TextSegment] = []

    def add(start: int, end: int, role: str, own: bool, weight: float) -> None:
        if start >= end:
            return
        if found and found[-1][2:] == (role, own, weight) and not own:
            found[-1] = (found[-1][0], end, role, own, weight)
        else:
            found.append((start, end, role, own, weight))

    def add_others(start: int, end: int) -> None:
        at = start
        for a, b, role, weight in pieces:
            if b > start and a < end:
                add(at, max(a, start), SCAFFOLD, False, 1.0)
                add(max(a, start), min(b, end), role, False, weight)
                at = min(b, end)
        add(at, end, SCAFFOLD, False, 1.0)

    at = 0
    for start, end, weight, own in mine:
        add_others(at, start)
        add(start, end, OWN_ROLE, own, weight)
        at = end
    add_others(at, length)
    return found
