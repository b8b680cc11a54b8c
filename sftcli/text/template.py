"""Chat templates: built in, from a file, from a model folder, or made of a text such as `<s>{q}<sep>{answer}</s>`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from sftcli.artifacts import fingerprint
from sftcli.errors import DataError, UsageError
from sftcli.reading import read_bytes
from sftcli.text.records import COMPLETION_NAMES
from sftcli.text.sandbox import environment
from sftcli.text.verbatim import writes_contents
from sftcli.text.watch import limited

BUILT_IN = Path(__file__).parent / "templates"
NAMES = (*sorted(path.stem for path in BUILT_IN.glob("*.jinja")), "plain")
REASONING = ("reasoning_content", "thinking", "reasoning")
PLAIN_TEXT = "<bos>{prompt}<sep>{completion}<eos>"


class TooSlow(DataError):
    """A template that does not come to an end."""


class Template:
    """A compiled chat template. `specials` are the names it may use: bos_token, eos_token, ..."""

    def __init__(self, source: str, name: str, specials: Mapping[str, str]):
        self.source, self.name, self.specials = source, name, dict(specials)
        self.hash = fingerprint(source, json.dumps(self.specials, sort_keys=True))
        self.header: dict[str, Any] = _header(source)
        try:
            self.environment = environment()
            self.compiled = limited(self.environment.from_string, source)
            self.contents = writes_contents(source, self.environment)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"template {name}, line {error.lineno}: {error.message}") from None
        except (RecursionError, SyntaxError, TimeoutError):  # Python has limits of its own, Jinja takes cubic time
            raise UsageError(f"template {name} is nested too deeply") from None

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that a text template names, the completion last; empty for others."""
        return tuple(self.header.get("fields", ()))

    def readable(self, messages: list[dict[str, Any]], tools: Any = None) -> list[dict[str, Any]]:
        """The messages; those whose parts of text it does not all write have them as one text, a line each (as vLLM).

        Some templates fail with a list, some write it as Python does: then no mark of ours comes out as it went in."""
        marked = {
            i: message | {"content": _marks(i, message["content"])}
            for i, message in enumerate(messages)
            if isinstance(message.get("content"), list)
        }
        if not marked:
            return messages
        try:
            text = self.render([marked.get(i, message) for i, message in enumerate(messages)], tools, False)
        except DataError:
            text = ""

        def is_read(parts: list[dict[str, Any]]) -> bool:
            return bool(parts) and all(part["text"] in text for part in parts)

        unread = {i for i, message in marked.items() if not is_read(message["content"])}
        return [_joined(message) if i in unread else message for i, message in enumerate(messages)]

    def render(self, messages: list[Any], tools: Any, open_turn: bool) -> str:
        """Text of the messages; `open_turn` ends it where the model is to speak. Raises DataError."""
        messages = [_with_reasoning(message) if len(message) > 2 else message for message in messages]
        given = {"messages": messages, "tools": tools, "add_generation_prompt": open_turn, "documents": None}
        try:
            self.environment.written = 0
            return str(limited(self.compiled.render, given | self.specials))
        except TimeoutError as error:
            raise TooSlow(f"template {self.name} failed: {error}") from None
        except jinja2.TemplateError as error:
            raise DataError(f"template {self.name} refused it: {error.message or type(error).__name__}") from None
        except Exception as error:  # a template is a program from elsewhere: any of Python's errors may come out
            raise DataError(f"template {self.name} failed: {type(error).__name__}: {error}") from None


def _marks(message: int, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part | {"text": f"\0{message}.{i}\0"} for i, part in enumerate(parts)]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": "\n".join(part["text"] for part in message["content"])}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning goes by any of its names has it by those that templates read, as in transformers."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


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
        return Template(text_template(text or PLAIN_TEXT, columns), repr(text) if text else "plain", specials)
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
    header = json.dumps({"text": text, "fields": fields}).replace("#}", "#\\u007d")
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
    """{"controls": [...], "bos", "eos", "pad"} that a tokenizer for this template needs; "tags": those of the controls,
    such as <think> and </tool_call>, that a turn holds and other programs read."""
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
    closed = {token.replace("</", "<") for token in found if token.startswith("</")} if ends and not text else set()
    tags = [token for token in controls if token.replace("</", "<") in closed - {"<s>"}]
    return {"controls": controls, "bos": bos, "eos": ends[0] if ends else None, "pad": pad, "tags": tags}
